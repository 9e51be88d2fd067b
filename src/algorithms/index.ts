/** Algorithms, and the pieces that new ones are made of (`lockstep-rlhf/algorithms`). */
export {
  type ActorWorker,
  type Addition,
  type Algorithm,
  type AlgorithmState,
  type Awaitable,
  type Context,
  type CostWorker,
  type CriticWorker,
  defineAlgorithm,
  type Evaluation,
  type Experience,
  type GenerationOptions,
  type Iteration,
  type Learner,
  type Models,
  type Prompt,
  type ReferenceWorker,
  type Rewards,
  type RewardWorker,
  type Rollout,
  type RolloutAlgorithm,
  type UpdateOptions,
  type UpdateStatistics,
} from './algorithm.js';
export {
  type DistillationSettings,
  distillation,
  makeExperience as distillationExperience,
} from './distillation.js';
export { type GrpoSettings, grpo, makeExperience as groupExperience } from './grpo.js';
export { type JudgedAnswer, type JudgedBatch, judgedBatch, kto } from './kto.js';
export { actorMetrics, costMetrics, criticMetrics, klMetrics, type Metrics, rolloutMetrics } from './metrics.js';
export {
  type ActorCriticSettings,
  actorLoss as ppoLoss,
  makeExperience as ppoExperience,
  type PpoSettings,
  ppo,
} from './ppo.js';
export {
  type Preference,
  type PreferenceModels,
  type PreferenceSettings,
  preference,
  preferenceBatch,
} from './preference.js';
export {
  makeExperience as reinforcePlusPlusExperience,
  type ReinforcePlusPlusSettings,
  reinforcePlusPlus,
} from './reinforce-plus-plus.js';
export { makeExperience as remaxExperience, type RemaxSettings, remax } from './remax.js';
export {
  costBatch,
  costModel,
  type Pair,
  type RewardModels,
  rewardBatch,
  rewardModel,
  type SafetyPair,
  type ScoreAlgorithm,
} from './reward-model.js';
export { type RlooSettings, rloo } from './rloo.js';
export {
  learnedMask,
  placeScores,
  pretrainingMix,
  sampledExperience,
  spans,
  sumsBySequence,
  type TruncationSettings,
} from './rollout.js';
export { makeExperience as safeRlhfExperience, type SafeRlhfSettings, safeRlhf } from './safe-rlhf.js';
export type { SamplingSettings } from './sampling.js';
export { type SftExample, type SftModels, sft, sftBatch } from './sft.js';
