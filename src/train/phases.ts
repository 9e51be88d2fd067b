/** The calls of a run and what each needs on the device: the preflight adds them up, and offload plans its moves by them. */
import { generationRows, generationSequences } from '../engine/native-engine.js';
import {
  largestCall,
  type ModelPlan,
  pagePositions,
  planGeneration,
  planModel,
  planScoring,
  planTraining,
} from '../layout/memory-plan.js';
import { resolveParts } from '../layout/parts.js';
import { type Phase, type RotatingModel, type StateGroup, stateGroups } from '../layout/rotation.js';
import { tensorTable } from '../layout/tensor-table.js';
import type { Config } from './config.js';
import type { Role } from './roles.js';

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

export function statesOf(roles: readonly Role[], config: Config): RotatingModel[] {
  return roles.map((role) => {
    const { weightsBytes, gradientBytes, optimizerBytes } = modelPlan(role, config);
    return {
      name: role.name,
      bytes: { parameters: weightsBytes, gradients: gradientBytes, optimizer: optimizerBytes },
    };
  });
}

function modelPlan({ shape, trained }: Role, { dtype, numerics }: Config): ModelPlan {
  return planModel(tensorTable(shape, resolveParts(shape, numerics.parts)), dtype, trained);
}

/** Phases by which a trained model's state is read and written, and any model is opened. */
export const holding = (role: Role['name']): string => `hold ${role}`;
export const opening = (role: Role['name']): string => `open ${role}`;

/** In the order of a step; those that come now and then are `rare`. */
export function phasesOf(roles: readonly Role[], config: Config): RunPhase[] {
  const calls: [phase: string, role: Role['name'], kind: Kind, rare?: 'rare'][] = {
    sft: [
      ['update', 'policy', 'train'],
      ['evaluation', 'policy', 'score', 'rare'],
      ['generation', 'policy', 'generate', 'rare'],
    ],
    reward: [
      ['update', 'reward', 'train'],
      ['evaluation', 'reward', 'score', 'rare'],
    ],
    ppo: [
      ['generation', 'policy', 'generate'],
      ['values', 'critic', 'score'],
      ['reference', 'reference', 'score'],
      ['reward', 'reward', 'score'],
      ['valueUpdate', 'critic', 'train'],
      ['policyUpdate', 'policy', 'train'],
      ['evaluation', 'policy', 'generate', 'rare'],
    ],
  }[config.algorithm] as [string, Role['name'], Kind, 'rare'?][];
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

/** The largest call of a kind. Generation takes as many pages as there are; it needs those of one sequence. */
function workspaceOf(
  kind: Kind,
  { name, shape }: Role,
  { dtype, batch, rollout, memory }: Config,
): Pick<RunPhase, 'workspaceBytes' | 'wishedBytes' | 'what'> {
  const rows = batch.microTokens;
  const size = largestCall(rows, batch.sequences);
  if (kind === 'score' || kind === 'train') {
    const scoring = planScoring(shape, dtype, size).total;
    const training = kind === 'train' ? planTraining(shape, dtype, size, memory.recompute).total : 0;
    return training > scoring
      ? { workspaceBytes: training, what: `workspace: ${name}, training on ${rows} tokens` }
      : { workspaceBytes: scoring, what: `workspace: ${name}, forward of ${rows} tokens` };
  }
  const sequences = Math.min(batch.sequences, generationSequences);
  const pagesOf = (positions: number): number => Math.ceil(Math.min(shape.maxPositions, positions) / pagePositions) + 1;
  const bytes = (pages: number): number =>
    planGeneration(shape, dtype, { rows: Math.max(sequences, generationRows), sequences, pages }).total;
  return {
    workspaceBytes: bytes(pagesOf(rows + rollout.maxNewTokens)),
    // All sequences together, with prompts as long as the responses may be.
    wishedBytes: bytes(sequences * pagesOf(2 * rollout.maxNewTokens)),
    what: `workspace: ${name}, generation`,
  };
}
