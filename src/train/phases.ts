/** The calls of a run and what each needs on the device: the preflight adds them up, and offload plans its moves by them. */
import { generationRows, generationSequences, sampledRows } from '../engine/generation-needs.js';
import { logitBlockOf, rowGrainOf } from '../engine/native.js';
import { generationView } from '../layout/generation-view.js';
import {
  type Dtype,
  largestCall,
  type ModelPlan,
  pagePositions,
  planGeneration,
  planModel,
  planScoring,
  planTraining,
} from '../layout/memory-plan.js';
import { coordinatesOf, worldSize } from '../layout/parallel.js';
import { resolveParts } from '../layout/parts.js';
import { microBatchesInFlight, scheduleOfRun } from '../layout/pipeline-schedule.js';
import { type RankShare, rankShare } from '../layout/rank-share.js';
import { type Phase, type RotatingModel, type StateGroup, stateGroups } from '../layout/rotation.js';
import { type ShardTensor, shardTable } from '../layout/shards.js';
import { transitionPlan } from '../layout/transition-plan.js';
import { parameterUnits, planUnits, type UnitUse } from '../layout/units.js';
import { learnsFromRollouts } from './algorithms.js';
import type { Config, ConfigOf } from './config.js';
import type { Role, RoleName } from './roles.js';

/** A call that workers make under the name of a phase of the recorder. */
export interface RunPhase extends Phase {
  /** What takes the workspace. */
  what: string;
}

type Kind = 'generate' | 'score' | 'train' | 'hold';

const needs: Record<Kind, readonly StateGroup[]> = {
  generate: ['parameters'],
  score: ['parameters'],
  train: stateGroups,
  // Without computing: a checkpoint's weights are the masters, which lie with the optimizer's state.
  hold: ['parameters', 'optimizer'],
};

/** What one rank has of a model. */
interface RankOfRole {
  share: RankShare;
  table: readonly ShardTensor[];
  stage: number;
}

/** Ranks have unequal shares; a budget is that of each: the largest value over the ranks of a run. */
export function mostOf({ shape }: Role, { parallel, numerics }: Config, value: (rank: RankOfRole) => number): number {
  const { pipeline, tensor, data, zero } = parallel;
  const degrees = { pipeline, tensor, data };
  const parts = resolveParts(shape, numerics.parts);
  // Replicas differ by their ZeRO pieces only.
  const ranks = zero > 0 ? worldSize(degrees) : pipeline * tensor;
  const values = Array.from({ length: ranks }, (_, rank) =>
    value({
      share: rankShare(shape, parts, degrees, rank),
      table: shardTable(shape, parts, degrees, rank),
      stage: coordinatesOf(rank, degrees).pipeline,
    }),
  );
  return Math.max(...values);
}

export function statesOf(roles: readonly Role[], config: Config): RotatingModel[] {
  return roles.map((role) => {
    const most = (arena: 'weightsBytes' | 'gradientBytes' | 'optimizerBytes'): number =>
      mostOf(role, config, (rank) => modelPlan(role, config, rank)[arena]);
    return {
      name: role.name,
      bytes: { parameters: most('weightsBytes'), gradients: most('gradientBytes'), optimizer: most('optimizerBytes') },
    };
  });
}

function modelPlan({ trained }: Role, { dtype, parallel }: Config, { share, table }: RankOfRole): ModelPlan {
  return planModel(table, dtype, trained, { stage: parallel.zero, rank: share.dataRank, ranks: share.dataRanks });
}

/** Phases by which a trained model's state is read and written, and any model is opened. */
export const holding = (role: Role['name']): string => `hold ${role}`;
export const opening = (role: Role['name']): string => `open ${role}`;

type Call = readonly [phase: string, role: RoleName, kind: Kind, rare?: 'rare'];

/** Of an iteration: those of roles that a run has. */
const rolloutCalls: readonly Call[] = [
  ['generation', 'policy', 'generate'],
  ['values', 'critic', 'score'],
  ['costValues', 'costCritic', 'score'],
  ['reference', 'reference', 'score'],
  ['teacher', 'teacher', 'score'],
  ['reward', 'reward', 'score'],
  ['cost', 'cost', 'score'],
  ['valueUpdate', 'critic', 'train'],
  ['costValueUpdate', 'costCritic', 'train'],
  ['policyUpdate', 'policy', 'train'],
  ['evaluation', 'policy', 'generate', 'rare'],
  ['logprobs', 'policy', 'score', 'rare'],
];

/** Of a step that learns from rows; the model that learns is the first. */
const supervisedCalls = ([first]: readonly Role[]): readonly Call[] => [
  ['reference', 'reference', 'score'],
  ['logprobs', first!.name, 'score'],
  ['update', first!.name, 'train'],
  ['evaluation', first!.name, 'score', 'rare'],
  ['generation', first!.name, 'generate', 'rare'],
];

/** In the order of a step; those that come now and then are `rare`. */
export function phasesOf(roles: readonly Role[], config: Config): RunPhase[] {
  const calls = learnsFromRollouts(config) ? rolloutCalls : supervisedCalls(roles);
  const byName = new Map(roles.map((role) => [role.name, role]));
  const computing = calls.flatMap(([name, roleName, kind, rare]) => {
    const role = byName.get(roleName);
    // Without sample texts a run does not generate.
    if (!role || (kind === 'generate' && !role.generates)) return [];
    return [{ ...workspaceOf(kind, role, config), name, model: roleName, groups: needs[kind], rare: rare === 'rare' }];
  });
  const still = { workspaceBytes: 0, what: 'no workspace', rare: true };
  return [
    ...computing,
    ...roles.flatMap(({ name, trained }) => [
      ...(trained ? [{ ...still, name: holding(name), model: name, groups: needs.hold }] : []),
      { ...still, name: opening(name), model: name, groups: stateGroups },
    ]),
  ];
}

/** A pair is two sequences of one micro-batch. */
const sequencesOfRow = ({ algorithm }: Config): number =>
  ['reward', 'cost', 'dpo', 'simpo', 'orpo'].includes(algorithm) ? 2 : 1;

/** Most rows that are learned from together. */
const learnedRows = (config: Config): number =>
  Math.max(config.batch.sequences, (config as Partial<ConfigOf<'ppo'>>).ptx?.sequences ?? 0);

/** Most sequences of a call of each kind; evaluations score and generate, too. */
export function mostSequences(config: Config): Record<'train' | 'score' | 'generate', number> {
  const { batch, data, evaluation } = config;
  const evaluated = data.eval === undefined ? 0 : evaluation.rows;
  return {
    train: sequencesOfRow(config) * learnedRows(config),
    score: sequencesOfRow(config) * Math.max(learnedRows(config), evaluated),
    generate: learnsFromRollouts(config) ? Math.max(batch.sequences, evaluated) : evaluation.samples,
  };
}

/** The largest call of a kind. Generation takes as many pages as there are; it needs those of one sequence. */
function workspaceOf(
  kind: Kind,
  role: Role,
  config: Config,
): Pick<RunPhase, 'workspaceBytes' | 'wishedBytes' | 'what'> {
  const { name, shape } = role;
  const { dtype, batch, rollout } = config;
  const rows = batch.microTokens;
  const most = mostSequences(config);
  const logits = logitBlockOf(config.device);
  if (kind === 'score' || kind === 'train') {
    const size = largestCall(rows, most[kind], rowGrainOf(config.device));
    const scoring = mostOf(role, config, (rank) => {
      const begin = unitBytes(rank, dtype, config.parallel.zero, 'scoring');
      return planScoring(rank.share.shape, dtype, size, { ...rank.share, logits }, begin).total;
    });
    const training = kind === 'train' ? mostOf(role, config, (rank) => trainingBytes(role, config, rank)) : 0;
    return training > scoring
      ? { workspaceBytes: training, what: `workspace: ${name}, training on ${rows} tokens` }
      : { workspaceBytes: scoring, what: `workspace: ${name}, forward of ${rows} tokens` };
  }
  const sequences = Math.min(most.generate, generationSequences);
  const pagesOf = (positions: number): number => Math.ceil(Math.min(shape.maxPositions, positions) / pagePositions) + 1;
  const bytes = (pages: number): number => {
    const samples = sampledRows(sequences, rollout.speculation);
    const call = { rows: Math.max(samples, generationRows), sequences: samples, pages };
    return config.generation
      ? mostOfGeneration(role, config, call)
      : mostOf(role, config, (rank) => {
          const begin = unitBytes(rank, dtype, config.parallel.zero, 'generation');
          return planGeneration(rank.share.shape, dtype, call, rank.share, begin).total;
        });
  };
  return {
    workspaceBytes: bytes(pagesOf(rows + rollout.maxNewTokens)),
    // All sequences together, with prompts as long as the responses may be.
    wishedBytes: bytes(sequences * pagesOf(2 * rollout.maxNewTokens)),
    what: `workspace: ${name}, generation`,
  };
}

/**
 * In a generation layout of its own: the shards that a rank gathers and what generation takes beside them, both of which are the
 * workspace's in training.
 */
function mostOfGeneration(
  { shape }: Role,
  { dtype, parallel, generation, numerics }: Config,
  call: { rows: number; sequences: number; pages: number },
): number {
  const { pipeline, tensor, transition: engine } = generation!;
  const parts = resolveParts(shape, numerics.parts);
  // Training replicas have the same buffers; of ds-chat and hybridflow-v the training shard lies beside them.
  const train = { pipeline: parallel.pipeline, tensor: parallel.tensor, data: 1 };
  const options = { shape, parts, dtype, train, generation: { pipeline, tensor }, engine };
  const plan = transitionPlan(options);
  const needs = plan.ranks.map(({ training }, rank) => {
    const view = generationView(options, plan, rank);
    const share = rankShare(shape, parts, view.degrees, view.rank, view.stages);
    const gathered = view.memoryBytes - (training.slotOffset === undefined ? 0 : training.arenaBytes);
    return gathered + planGeneration(share.shape, dtype, call, share).total;
  });
  return Math.max(...needs);
}

/** With as many micro-batches under way as the rank's stage may hold; from ZeRO stage 2 on, all of a step. */
function trainingBytes({ shape }: Role, config: Config, rank: RankOfRole): number {
  const { device, dtype, batch, memory, parallel } = config;
  const { share, stage } = rank;
  const size = largestCall(batch.microTokens, mostSequences(config).train, rowGrainOf(device));
  const rows = Math.ceil(learnedRows(config) / parallel.data);
  const mostTokens = rows * sequencesOfRow(config) * shape.maxPositions;
  // Two micro-batches that follow each other have more than microTokens together, or one would have taken both.
  const microBatches = Math.min(rows, Math.ceil((2 * mostTokens) / batch.microTokens));
  const schedule = scheduleOfRun(parallel.schedule, parallel.pipeline, microBatches);
  const inPipeline = microBatchesInFlight(schedule)[stage]!;
  const breadthFirst = parallel.zero >= 2;
  const slots = { count: breadthFirst ? microBatches : inPipeline, sizes: [size] };
  const begin = unitBytes(rank, dtype, parallel.zero, 'training');
  const options = {
    recompute: memory.recompute,
    breadthFirst,
    place: { ...share, logits: logitBlockOf(device) },
    begin,
    slots,
  };
  return planTraining(share.shape, dtype, size, options).total;
}

/** Buffers of divided weights and gradients, before the others of a call. */
function unitBytes({ share, table }: RankOfRole, dtype: Dtype, zero: number, use: UnitUse): number {
  return planUnits(table, parameterUnits(table, share.shape.layers), dtype, zero, use).total;
}
