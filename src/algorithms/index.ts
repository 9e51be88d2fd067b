/** Algorithms, and the pieces that new ones are made of (`lockstep-rlhf/algorithms`). */
export {
  type Addition,
  type Algorithm,
  type Awaitable,
  type Context,
  defineAlgorithm,
  type Experience,
  type Iteration,
  type Models,
  type Prompt,
  type Rewards,
  type Rollout,
  type RolloutAlgorithm,
  type UpdateOptions,
} from './algorithm.js';
export { type DistillationSettings, distillation } from './distillation.js';
export { type GrpoSettings, grpo, makeExperience as groupExperience } from './grpo.js';
export { judgedBatch, kto } from './kto.js';
export { actorMetrics, costMetrics, criticMetrics, klMetrics, rolloutMetrics } from './metrics.js';
export { actorLoss as ppoLoss, makeExperience as ppoExperience, type PpoSettings, ppo } from './ppo.js';
export { preference, preferenceBatch } from './preference.js';
export { type ReinforcePlusPlusSettings, reinforcePlusPlus } from './reinforce-plus-plus.js';
export { makeExperience as remaxExperience, type RemaxSettings, remax } from './remax.js';
export { costBatch, costModel, rewardBatch, rewardModel } from './reward-model.js';
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
export { sft, sftBatch } from './sft.js';
