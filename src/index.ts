/**
 * Lockstep: reinforcement learning from human or programmatic feedback, from Node.js. Importing it starts nothing; the native
 * addon is loaded when a model is opened. `lockstep-rlhf/algorithms` and `lockstep-rlhf/losses` have what algorithms are made of.
 */
export { createDevice, createEngine } from './checkpoints/load-model.js';
export type { Future, Materialised } from './cluster/future.js';
export type { ResourcePool, ResourcePoolOptions } from './cluster/resource-pool.js';
export { ResourcePools } from './cluster/resource-pools.js';
export { LockstepError } from './errors.js';
export { type Completion, type GenerateSettings, generate, type InputRow } from './inference/generate.js';
export { type OpenModel, type OpenModelOptions, openModel } from './inference/open-model.js';
export { type Scored, type ScoreSettings, score } from './inference/score.js';
export { rewardFunctions } from './rewards/built-in/registry.js';
export type { Reward, RewardFunction, RewardSample } from './rewards/reward-function.js';
export {
  type Config,
  type ConfigInput,
  type ConfigOf,
  configJsonSchema,
  defineConfig,
  loadConfig,
  parseConfig,
} from './train/config.js';
export type { MetricsRow, Sample, TrainEvent } from './train/events.js';
export { type TrainOptions, train } from './train/train.js';
export { ActorWorker } from './workers/actor.js';
export { CostWorker } from './workers/cost.js';
export { CriticWorker } from './workers/critic.js';
export { ReferenceWorker } from './workers/reference.js';
export { RewardWorker } from './workers/reward.js';
