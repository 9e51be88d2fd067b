/** The models of an algorithm, each over an engine: what programs call (`lockstep-rlhf/workers`). */
export type { GenerationOptions } from '../data/rollout.js';
export type { Experience } from '../losses/loss.js';
export { type ActorSettings, ActorWorker } from './actor.js';
export type { ForwardSettings } from './batches.js';
export type { CanaryReport } from './canary.js';
export { CostWorker } from './cost.js';
export { CriticWorker } from './critic.js';
export type { Addition, LearnResult } from './learn.js';
export type { LearnerSettings, UpdateCount, UpdateOptions } from './learner.js';
export { ReferenceWorker } from './reference.js';
export { RewardWorker } from './reward.js';
