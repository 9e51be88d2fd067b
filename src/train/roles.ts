/** Which models a run has, what each starts from, and their engines. */
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Models } from '../algorithms/algorithm.js';
import { type Checkpoint, openCheckpoint } from '../checkpoints/hugging-face.js';
import { philox } from '../data/sampler.js';
import type { Engine } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import { withHead } from '../layout/config.js';
import type { Head, ModelShape } from '../layout/model-shape.js';
import { shapes } from './algorithm-schemas.js';
import { learnsFromRollouts, rolloutAlgorithm } from './algorithms.js';
import type { Closable } from './closing.js';
import type { Config, ConfigOf } from './config.js';
import type { RunPools } from './pools.js';
import { preferenceModels } from './preferences.js';
import type { Lane, Recorder } from './recorder.js';
import { rewardModel } from './reward-schema.js';

/** Models of a run; the policy is the actor of algorithms. */
export type RoleName = 'policy' | 'critic' | 'costCritic' | 'reference' | 'reward' | 'cost' | 'teacher';

export interface Role {
  name: RoleName;
  /** What it starts from at step 0, and whose tokenizer its checkpoints have. */
  checkpoint: Checkpoint;
  head: Head;
  shape: ModelShape;
  trained: boolean;
  /** Generates, too. */
  generates: boolean;
  /** Where it lies in a checkpoint of the run; only for trained ones. */
  folder: string;
}

/**
 * The models of a run, the one it is about first. `used` are those of the algorithm, where it is not the configuration's own.
 * @throws LockstepError PROGRAM_MODELS when it uses one that the configuration does not name
 */
export async function rolesOf(config: Config, used?: readonly (keyof Models)[]): Promise<Role[]> {
  if (used) checkNamed(used, config);
  const base = await openCheckpoint(config.model);
  const rollouts = learnsFromRollouts(config);
  const generates = rollouts || (config.evaluation.samples > 0 && config.data.eval !== undefined);
  switch (config.algorithm) {
    case 'sft':
      return [role('policy', base, 'language', { trained: true, generates })];
    case 'reward':
    case 'cost':
      return [role(config.algorithm, base, 'score', { trained: true })];
    default: {
      const own = used ?? (rollouts ? rolloutAlgorithm(config).models : preferenceModels(config));
      const evaluates = rollouts && config.data.eval !== undefined && config.evaluation.every > 0;
      const names: readonly string[] = evaluates ? [...own, ...judgesOf(config)] : own;
      const roles = [role('policy', base, 'language', { trained: true, generates })];
      for (const name of roleOrder)
        if (names.includes(name)) roles.push(...(await others[name](config as ModelKeys, base)));
      for (const other of roles.slice(1)) checkVocabulary(roles[0]!, other);
      return roles;
    }
  }
}

type OtherRole = Exclude<RoleName, 'policy'>;
const roleOrder: readonly OtherRole[] = ['critic', 'costCritic', 'reference', 'teacher', 'reward', 'cost'];

const judges = ['reward', 'cost', 'teacher'] as const;

/** What evaluations judge answers by, whether the algorithm uses it or not. */
const judgesOf = (config: Config): readonly OtherRole[] => judges.filter((name) => name in config);

/** Other models have a start of their own. */
function checkNamed(used: readonly (keyof Models)[], config: Config): void {
  const missing = judges.find((name) => used.includes(name) && !(name in config));
  if (missing === undefined) return;
  const having = Object.keys(shapes).filter((name) => missing in shapes[name as keyof typeof shapes]);
  throw new LockstepError(
    'PROGRAM_MODELS',
    `the program uses the model ${missing}, which a configuration of algorithm: ${config.algorithm} does not name; take it out of the ` +
      `program's models, or set algorithm to one with the key ${missing}: ${having.join(', ')}`,
    { model: missing, algorithm: config.algorithm },
  );
}

/** The keys of all algorithms under which models are named. */
type ModelKeys = Partial<
  Pick<ConfigOf<'safe-rlhf'>, 'critic' | 'costCritic' | 'reference' | 'reward' | 'cost'> &
    Pick<ConfigOf<'distillation'>, 'teacher'>
>;

/** A critic starts from what it is to predict, where that is a model. */
const others: Record<OtherRole, (config: ModelKeys, base: Checkpoint) => Promise<Role[]>> = {
  critic: async ({ critic, reward }, base) => {
    const start = critic?.model ?? (reward && rewardModel(reward));
    const trained = { trained: true, folder: 'critic' };
    return [role('critic', start === undefined ? base : await openCheckpoint(start), 'value', trained)];
  },
  costCritic: async ({ costCritic, cost }, base) => {
    const start = costCritic?.model ?? (cost && rewardModel(cost));
    const trained = { trained: true, folder: 'cost-critic' };
    return [role('costCritic', start === undefined ? base : await openCheckpoint(start), 'value', trained)];
  },
  reference: async ({ reference }, base) => {
    const start = reference?.model;
    return [role('reference', start === undefined ? base : await openCheckpoint(start), 'language', {})];
  },
  teacher: async ({ teacher }) => [role('teacher', await openCheckpoint(teacher!.model), 'language', {})],
  reward: async ({ reward }) => scorer('reward', reward && rewardModel(reward)),
  cost: async ({ cost }) => scorer('cost', cost && rewardModel(cost)),
};

/** None for a reward or cost that is a function. */
async function scorer(name: 'reward' | 'cost', model: string | undefined): Promise<Role[]> {
  return model === undefined ? [] : [role(name, scoring(name, await openCheckpoint(model)), 'score', {})];
}

function role(
  name: Role['name'],
  checkpoint: Checkpoint,
  head: Head,
  { trained = false, generates = false, folder = '' }: Partial<Pick<Role, 'trained' | 'generates' | 'folder'>>,
): Role {
  return { name, checkpoint, head, shape: withHead(checkpoint.shape, head), trained, generates, folder };
}

/** A reward model must know how to score: a head that starts at zero would reward everything alike. */
function scoring(name: 'reward' | 'cost', checkpoint: Checkpoint): Checkpoint {
  if (checkpoint.shape.head === 'score') return checkpoint;
  throw new LockstepError(
    'MODEL_HEAD',
    `${name}.model ${checkpoint.directory} has a ${checkpoint.shape.head} head; expected a *ForSequenceClassification with one ` +
      'label, such as `algorithm: reward` trains',
    { directory: checkpoint.directory, expected: 'score', received: checkpoint.shape.head },
  );
}

function checkVocabulary(policy: Role, other: Role): void {
  if (other.shape.vocabulary === policy.shape.vocabulary) return;
  throw new LockstepError(
    'MODEL_VOCABULARY',
    `the ${other.name} model ${other.checkpoint.directory} has a vocabulary of ${other.shape.vocabulary}, the policy one of ` +
      `${policy.shape.vocabulary}; all models of a run must read the same token ids`,
    { role: other.name, expected: policy.shape.vocabulary, received: other.shape.vocabulary },
  );
}

/** Names of roles whose tokenizer files differ from the policy's, where both have them. */
export async function foreignTokenizers([policy, ...others]: readonly Role[]): Promise<string[]> {
  const digest = async ({ checkpoint }: Role) =>
    readFile(join(checkpoint.directory, 'tokenizer.json')).then(
      (bytes) => createHash('sha256').update(bytes).digest('hex'),
      () => undefined,
    );
  const own = await digest(policy!);
  const digests = await Promise.all(others.map(digest));
  return others
    .filter((_, i) => own !== undefined && digests[i] !== undefined && digests[i] !== own)
    .map((r) => r.name);
}

export interface EngineContext {
  config: Config;
  recorder: Recorder;
  pools: RunPools;
  /** The run's checkpoint to continue from. */
  from?: string | undefined;
  /** Has a resource closed when the run ends, however it ends. */
  own<Resource extends Closable>(resource: Resource): Resource;
}

/** An engine for a role, with the weights of the checkpoint that the run continues or of the role's start. */
export async function openEngine(role: Role, context: EngineContext): Promise<Engine> {
  const { config, pools, from } = context;
  const { device, rotation, lane } = pools.of(role.name);
  const saved = role.trained && from !== undefined;
  const create = async () =>
    device.createEngine(saved ? await openCheckpoint(join(from, role.folder)) : role.checkpoint, {
      head: role.head,
      dtype: config.dtype,
      train: role.trained,
      parts: config.numerics.parts,
      recompute: config.memory.recompute,
      ...(role.generates && config.generation ? { generation: config.generation } : {}),
    });
  const engine = context.own(await (rotation ? rotation.open(role.name, create) : create()));
  if (role.trained && !saved && role.head === 'score' && role.checkpoint.shape.head !== 'score') {
    await engine.writeTensor('score.weight', initialScoreHead(role.shape.width, config.seed));
    await engine.publish();
  }
  countTransitions(engine, lane);
  const calls = {
    forward: 'forward',
    forwardEach: 'forward',
    backward: 'backward',
    step: 'optimizer',
    generate: 'generate',
    // Of one rank its forwards and backwards are recorded.
    ...(engine.replicas > 1 || 'ranks' in engine ? { accumulate: 'accumulate' as const } : {}),
  } as const;
  return lane.wrap(engine, calls, 'native');
}

/** Bytes and seconds of the ways to the generation layout, in the metrics of the step that they are made in. */
function countTransitions(engine: Engine, recorder: Lane): void {
  engine.onTransition = ({ receivedBytes, seconds }) => {
    recorder.add(
      'bytes.transition',
      receivedBytes.reduce((sum, bytes) => sum + bytes, 0),
    );
    recorder.add('seconds.transition', seconds);
  };
}

/** Normal numbers of standard deviation 1/sqrt(D + 1) (Huang et al. 2024, arXiv:2403.17031), a function of the seed. */
export function initialScoreHead(width: number, seed: number): Float32Array {
  const deviation = 1 / Math.sqrt(width + 1);
  const key: [number, number] = [seed >>> 0, Math.floor(seed / 2 ** 32) >>> 0];
  return Float32Array.from({ length: width }, (_, i) => {
    // The sum of twelve uniform numbers has variance 1; unlike log and cos it is the same on every machine.
    let sum = -6;
    for (let block = 0; block < 3; block++) {
      for (const word of philox(key, [i, block, 0, headStream])) sum += word / 2 ** 32;
    }
    return sum * deviation;
  });
}

/** Keeps these draws apart from other users of the same seed. */
const headStream = 0x68656164;
