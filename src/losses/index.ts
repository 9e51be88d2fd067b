/** Losses, advantages, statistics and controllers: what algorithms are written with (`lockstep-rlhf/losses`). */
export { type OverlongSettings, overlongPenalties } from '../data/overlong.js';
export { type Advantages, adaptiveLambda, type GaeInputs, type GaeSettings, gae } from './advantages.js';
export { type Aggregation, type AggregationMode, aggregate, aggregationModes, meanOverTokens } from './aggregation.js';
export {
  type AdaptiveKlSettings,
  adaptiveKl,
  fixedKl,
  type KlController,
  type KlControllerState,
} from './controllers.js';
export {
  type GroupAdvantage,
  type GroupAdvantageName,
  type GroupAdvantageSettings,
  type GroupCounts,
  type Groups,
  groupAdvantages,
  groupCounts,
  overTokens,
  type PromptBatch,
  promptMeanWeights,
  returnsToGo,
  type TokenRewards,
} from './group-advantages.js';
export {
  importanceWeighted,
  type KlClamp,
  type KlEstimator,
  type KlPenalty,
  type KlPenaltyInputs,
  type KlPenaltySettings,
  klEstimate,
  klPenalty,
} from './kl.js';
export { type KtoSettings, kto, ktoBaseline } from './kto.js';
export {
  combineAdvantages,
  type LagrangeMultiplier,
  type LagrangeSettings,
  type LagrangeState,
  lagrangeMultiplier,
  type SafetyPenalty,
  type SafetyPenaltyInputs,
  safetyPenalty,
} from './lagrange.js';
export {
  type Coupling,
  evaluateLoss,
  type Loss,
  type LossBatch,
  type LossInputs,
  type LossResult,
  type OutputName,
  type Outputs,
} from './loss.js';
export { pretrainingLoss, weighted } from './mixed.js';
export { type OffPolicyMetrics, type OffPolicySettings, offPolicyMetrics } from './off-policy.js';
export {
  type ClipSettings,
  type PolicyColumn,
  type PolicyKlSettings,
  type PolicyLossSettings,
  type PolicyTermSettings,
  policyLoss,
  policyLossOf,
  type Surrogate,
} from './policy.js';
export {
  type ClipSelectionSettings,
  type CovarianceInputs,
  type KlCovSettings,
  selectForClip,
  selectForKl,
} from './policy-covariance.js';
export { type PolicyLossName, policyLosses } from './policy-losses.js';
export type { GmpoSettings, SequenceClipSettings } from './policy-sequence.js';
export type { CispoSettings, DppoSettings, DroSettings, SapoSettings } from './policy-token.js';
export {
  type ExoSettings,
  type IpoSettings,
  type PreferenceLossName,
  type PreferenceSettings,
  preferenceLosses,
  type SimpoSettings,
  type SmoothedPreferenceSettings,
} from './preference.js';
export { bradleyTerry, costModel, type RewardLossSettings } from './reward-model.js';
export {
  type BypassSettings,
  type CorrectionInputs,
  type CorrectionName,
  type CorrectionResult,
  type CorrectionSettings,
  type CorrectionStatistics,
  type CorrectionWeightSettings,
  corrections,
  correctionWeights,
  type Rejection,
  type RejectionResult,
  rejectionMask,
} from './rollout-correction.js';
export type { Numbers, Selection, Totals } from './selection.js';
export { crossEntropy } from './sft.js';
export {
  type ExplainedVarianceSettings,
  explainedVariance,
  type Moments,
  moments,
  normaliseScores,
  type VarianceKind,
  type WhiteningSettings,
  whiten,
} from './statistics.js';
export {
  optimalTokenBaseline,
  type RemaxInputs,
  type RemaxSettings,
  remaxReturns,
  type TokenBaselineInputs,
} from './token-baselines.js';
export { Scalar, SequenceArray, TokenArray } from './tokens.js';
export { type ValueLossSettings, valueLoss } from './value.js';
