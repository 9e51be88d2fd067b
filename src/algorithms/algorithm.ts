/**
 * What an algorithm is, and the roles it is played by. An algorithm sees per-token numbers only: no rank, shard, device,
 * file or clock. Whatever fulfils these roles (workers over engines, tables in tests) can run it.
 *
 * All per-token arrays are packed like the tokens and follow the engine's convention (see `LossBatch`): entry t of a
 * sequence belongs to the prediction of its token t+1 after tokens 0..t. The response of a sequence with P prompt and
 * R response tokens is therefore predicted at positions P−1 .. P+R−2, and the value of "predict token t+1" is values[t].
 */
import type { Awaitable } from '../data/awaitable.js';
import type { TokenBatch } from '../data/batch.js';
import type { GenerationOptions, Prompt, Rollout } from '../data/rollout.js';
import type { Experience, Loss } from '../losses/loss.js';

export type { Awaitable, Experience, GenerationOptions, Prompt, Rollout };

/** What a reward worker says about a rollout. */
export interface Rewards {
  /** Per sequence: the score of the whole answer. */
  readonly scores: Float64Array;
  /** Over the packed tokens, when rewards belong to tokens or steps; otherwise the score goes to the last token. */
  readonly tokens?: Float64Array | undefined;
  /** Of a reward that several terms add up to: each one's scores, by its name and without its weight. */
  readonly terms?: Readonly<Record<string, Float64Array>> | undefined;
}

export interface UpdateOptions {
  /** Times that every row is used. */
  readonly epochs: number;
  /** Optimizer steps per epoch. */
  readonly miniBatches: number;
  /** Of the run, from 1: the learning rate is a function of it. */
  readonly iteration: number;
  /** Batches whose losses are part of the same steps (ptx): one sum of gradients. */
  readonly also?: readonly Addition[] | undefined;
}

/** Another batch with its loss, normalised by its own totals. */
export interface Addition {
  readonly experience: Experience;
  readonly loss: Loss;
  /** Of its log-probs; default 1, whatever the rollout's is. */
  readonly temperature?: number | undefined;
}

/** Means over the optimizer steps of one update, each measured at the weights before its step. */
export interface UpdateStatistics {
  readonly loss: number;
  /** Before clipping. */
  readonly gradientNorm: number;
  readonly statistics: Readonly<Record<string, number>>;
}

export interface Evaluation {
  readonly loss: number;
  readonly statistics: Readonly<Record<string, number>>;
}

/** A model that learns. */
export interface Learner {
  readonly update: (experience: Awaitable<Experience>, loss: Loss, options: UpdateOptions) => Promise<UpdateStatistics>;
  /** The loss at the present weights, without learning. */
  readonly computeLoss: (experience: Awaitable<Experience>, loss: Loss) => Promise<Evaluation>;
}

/** The policy. */
export interface ActorWorker extends Learner {
  readonly generateSequences: (prompts: Awaitable<readonly Prompt[]>, options: GenerationOptions) => Promise<Rollout>;
  readonly computeLogprobs: (batch: Awaitable<TokenBatch>) => Promise<Float32Array>;
}

/** The value function. */
export interface CriticWorker extends Learner {
  readonly computeValues: (batch: Awaitable<TokenBatch>) => Promise<Float32Array>;
}

/** The policy that KL is measured against. */
export interface ReferenceWorker {
  readonly computeLogprobs: (batch: Awaitable<TokenBatch>) => Promise<Float32Array>;
}

/** A reward model, a function, or both. */
export interface RewardWorker {
  readonly computeRewards: (rollout: Awaitable<Rollout>) => Promise<Rewards>;
}

/** A cost model, a function, or both: higher is worse. */
export interface CostWorker {
  readonly computeCosts: (rollout: Awaitable<Rollout>) => Promise<Rewards>;
}

/** The roles of reinforcement learning from feedback; an algorithm may use some of them. */
export interface Models {
  readonly actor: ActorWorker;
  readonly critic: CriticWorker;
  readonly reference: ReferenceWorker;
  readonly reward: RewardWorker;
  readonly cost: CostWorker;
  /** The value function of costs. */
  readonly costCritic: CriticWorker;
  /** The policy that a student learns from. */
  readonly teacher: ReferenceWorker;
}

/** What one iteration did. Metric names are those of the run folder's contract. */
export interface Iteration {
  readonly metrics: Readonly<Record<string, number>>;
  readonly rollout?: Rollout | undefined;
  readonly rewards?: Rewards | undefined;
}

/** Everything that an algorithm carries from one iteration to the next; plain JSON for checkpoints. */
export type AlgorithmState = Readonly<Record<string, number | readonly number[]>>;

/** What an iteration is told beside its batch. */
export interface Context {
  /** From 1. */
  readonly iteration: number;
  /** Sequences to imitate beside the rollout (ptx), when the run has them. */
  readonly pretraining?: Experience | undefined;
  /** More prompts of the data, as many as asked for, each with its samples: for algorithms that filter. */
  readonly draw?: ((prompts: number) => Promise<readonly Prompt[]>) | undefined;
}

export interface Algorithm<Roles, Batch> {
  /** The roles that `iterate` uses. */
  readonly models: readonly (keyof Roles & string)[];
  /** Learns from one batch: prompts, or sequences to imitate. */
  iterate(models: Roles, batch: Batch, context: Context): Promise<Iteration>;
  state(): AlgorithmState;
  restore(state: AlgorithmState): void;
}

/** An algorithm that learns from rollouts of prompts; a prompt comes once for each of its samples, in a row. */
export type RolloutAlgorithm<Role extends keyof Models = keyof Models> = Algorithm<
  Pick<Models, Role>,
  readonly Prompt[]
>;

/** For algorithms that carry nothing over. */
export const stateless = { state: (): AlgorithmState => ({}), restore: (): void => {} };

/** An algorithm of one's own, which `train(config, { algorithm })` runs; without `state` it carries nothing over. */
export function defineAlgorithm<const Role extends keyof Models>(algorithm: {
  readonly models: readonly Role[];
  iterate(models: Pick<Models, Role>, prompts: readonly Prompt[], context: Context): Promise<Iteration>;
  state?(): AlgorithmState;
  restore?(state: AlgorithmState): void;
}): RolloutAlgorithm<Role> {
  return { ...stateless, ...algorithm };
}
