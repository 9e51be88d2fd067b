/** Which models a run has, what each starts from, and their engines. */
import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { type Checkpoint, openCheckpoint } from '../checkpoints/hugging-face.js';
import { philox } from '../data/sampler.js';
import type { Engine } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import { withHead } from '../layout/config.js';
import type { Head, ModelShape } from '../layout/model-shape.js';
import type { Closable } from './closing.js';
import type { Config, PpoConfig } from './config.js';
import type { RunPools } from './pools.js';
import type { Lane, Recorder } from './recorder.js';

export interface Role {
  name: 'policy' | 'critic' | 'reference' | 'reward';
  /** What it starts from at step 0, and whose files its checkpoints copy. */
  checkpoint: Checkpoint;
  head: Head;
  shape: ModelShape;
  trained: boolean;
  /** Generates, too. */
  generates: boolean;
  /** Where it lies in a checkpoint of the run; only for trained ones. */
  folder: string;
}

/** The models of a run, the one it is about first. */
export async function rolesOf(config: Config): Promise<Role[]> {
  const base = await openCheckpoint(config.model);
  const generates = config.evaluation.samples > 0 && config.data.eval !== undefined;
  if (config.algorithm === 'sft') return [role('policy', base, 'language', { trained: true, generates })];
  if (config.algorithm === 'reward') return [role('reward', base, 'score', { trained: true })];
  return ppoRoles(config, base);
}

async function ppoRoles(config: PpoConfig, base: Checkpoint): Promise<Role[]> {
  const reward = config.reward.model === undefined ? undefined : await openCheckpoint(config.reward.model);
  const critic = config.critic.model === undefined ? (reward ?? base) : await openCheckpoint(config.critic.model);
  const reference = config.reference.model === undefined ? base : await openCheckpoint(config.reference.model);
  const roles = [
    role('policy', base, 'language', { trained: true, generates: true }),
    role('critic', critic, 'value', { trained: true, folder: 'critic' }),
    role('reference', reference, 'language', {}),
    ...(reward ? [role('reward', scoring(reward), 'score', {})] : []),
  ];
  for (const other of roles.slice(1)) checkVocabulary(roles[0]!, other);
  return roles;
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
function scoring(checkpoint: Checkpoint): Checkpoint {
  if (checkpoint.shape.head === 'score') return checkpoint;
  throw new LockstepError(
    'MODEL_HEAD',
    `reward.model ${checkpoint.directory} has a ${checkpoint.shape.head} head; expected a *ForSequenceClassification with one ` +
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
