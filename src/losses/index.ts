/** Losses, advantages, statistics and controllers: what algorithms are written with (`lockstep-rlhf/losses`). */
export { type Advantages, adaptiveLambda, type GaeSettings, gae } from './advantages.js';
export { type Aggregation, type AggregationMode, aggregate, aggregationModes, meanOverTokens } from './aggregation.js';
export { adaptiveKl, fixedKl, type KlController } from './controllers.js';
export { groupFilters, overlongPenalties } from './dapo.js';
export {
  type GroupAdvantage,
  type GroupAdvantageName,
  type Groups,
  groupAdvantages,
  groupCounts,
  overTokens,
  promptMeanWeights,
  returnsToGo,
} from './group-advantages.js';
export { importanceWeighted, type KlEstimator, klEstimate, klPenalty } from './kl.js';
export { type KtoSettings, kto, ktoBaseline } from './kto.js';
export { combineAdvantages, type LagrangeSettings, lagrangeMultiplier, safetyPenalty } from './lagrange.js';
export { evaluateLoss, type Loss, type LossBatch, type LossInputs } from './loss.js';
export { pretrainingLoss, weighted } from './mixed.js';
export { type OffPolicyMetrics, type OffPolicySettings, offPolicyMetrics } from './off-policy.js';
export { type PolicyLossSettings, policyLoss, policyLossOf } from './policy.js';
export { selectForClip, selectForKl } from './policy-covariance.js';
export { type PolicyLossName, policyLosses } from './policy-losses.js';
export { type PreferenceLossName, preferenceLosses } from './preference.js';
export { bradleyTerry, costModel } from './reward-model.js';
export { corrections, correctionWeights, rejectionMask } from './rollout-correction.js';
export { crossEntropy } from './sft.js';
export { explainedVariance, moments, normaliseScores, whiten } from './statistics.js';
export { optimalTokenBaseline, remaxReturns } from './token-baselines.js';
export { Scalar, SequenceArray, TokenArray } from './tokens.js';
export { valueLoss } from './value.js';
