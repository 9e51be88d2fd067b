/**
 * Corrections for answers that another policy sampled than the one that is trained from: the rollout engine's numbers,
 * or an older policy. r = π_old / π_rollout at the sampled token. Weights and masks are constants of the update.
 *
 * TIS: Yao et al. 2025, fengyao.notion.site/off-policy-rl; IcePop: arXiv:2510.18855; sequence-level and masked
 * importance sampling, rejection by KL estimates: verl's rollout correction. In this library's synchronous runs r is
 * exactly 1.
 */
import { meanOverTokens, perCount } from './aggregation.js';
import { klEstimate } from './kl.js';
import type { Loss } from './loss.js';
import { type PolicyColumn, type PolicyTermSettings, policyLossOf, type SurrogateInputs } from './policy.js';
import { expand, type Numbers, select } from './selection.js';
import { TokenArray } from './tokens.js';

/** Packed log-probs of the sampled tokens. */
export interface CorrectionInputs {
  readonly lengths: Numbers;
  readonly mask: Numbers;
  /** Of the policy that is trained from, by the trainer. */
  readonly oldLogprobs: Numbers;
  /** Of the policy that sampled, by the rollout engine. */
  readonly rolloutLogprobs: Numbers;
}

export interface CorrectionSettings {
  /** How ratios become weights. */
  readonly rule: CorrectionName;
  /** Whose ratio: each token's, or the product over the sequence for all its tokens. `token` by default. */
  readonly level?: 'token' | 'sequence' | undefined;
  /** Bounds of the ratio; 0 and 2 by default. */
  readonly low?: number | undefined;
  readonly high?: number | undefined;
  /** Clamps log ratios to ± this before exp. Off by default (verl: 20). */
  readonly logRatioBound?: number | undefined;
}

/** A weight per token, from the log ratios of tokens (x) and what is asked of them. */
export type Correction = (x: TokenArray, bounds: { readonly low: number; readonly high: number }) => TokenArray;

/**
 * `tis`: clip(r, low, high). `icepop`: r within [low, high], 0 outside; with low 0 masked importance sampling.
 * `sequence-mask`: r in sequences whose geometric mean ratio lies within [low, high], 0 in others.
 */
export const corrections = {
  tis: (x, { low, high }) => x.exp().clip(low, high),
  icepop: (x, bounds) => within(x.exp(), x.exp(), bounds),
  'sequence-mask': (x, bounds) => within(x.exp(), x.meanBySequence().exp().overTokens(), bounds),
} satisfies Record<string, Correction>;

export type CorrectionName = keyof typeof corrections;

function within(weight: TokenArray, ratio: TokenArray, { low, high }: { low: number; high: number }): TokenArray {
  const outside = ratio.lessThan(low).plus(ratio.greaterThan(high));
  return weight.where(outside.lessThan(1), 0);
}

/** C of truncated importance sampling. */
const defaultHigh = 2;

/** The weight of every token for its log ratio. */
function weightsOf(logRatios: TokenArray, settings: CorrectionSettings): TokenArray {
  const { rule, low = 0, high = defaultHigh } = settings;
  return corrections[rule](leveled(logRatios, settings), { low, high });
}

/** The log ratio that counts for each token, bounded. */
function leveled(logRatios: TokenArray, { level = 'token', logRatioBound = Infinity }: CorrectionSettings): TokenArray {
  const x = level === 'sequence' ? logRatios.sumBySequence().overTokens() : logRatios;
  return x.clip(-logRatioBound, logRatioBound);
}

export interface CorrectionResult {
  /** Packed, 0 where the mask is 0: the column `weights` of a `weighted` policy loss. */
  readonly weights: Float64Array;
  readonly statistics: CorrectionStatistics;
}

/**
 * Weights are those before normalisation, over learned tokens; ratios those of tokens, or at sequence level of
 * sequences.
 */
export interface CorrectionStatistics {
  readonly mean: number;
  readonly max: number;
  readonly min: number;
  /** Fraction of tokens whose weight is 0. */
  readonly zeroFraction: number;
  /** (mean w)² / mean w²: 1 for equal weights. */
  readonly effectiveSampleSize: number;
  readonly maxRatio: number;
  readonly minRatio: number;
  /** Fractions of ratios above `high`, and below `low` (1 / high where that is 0). */
  readonly highFraction: number;
  readonly lowFraction: number;
  /** What the weights were divided by; 1 without `normalize`. */
  readonly normalizer: number;
}

export interface CorrectionWeightSettings extends CorrectionSettings {
  /** Divides by the mean weight over learned tokens, at sequence level over sequences. Off by default. */
  readonly normalize?: boolean | undefined;
  /** Sequences in the ratios' statistics: those with a learned token (default), or all, an empty one having ratio 1. */
  readonly sequences?: 'non-empty' | 'all' | undefined;
}

/** Importance weights for a whole rollout. */
export function correctionWeights(batch: CorrectionInputs, settings: CorrectionWeightSettings): CorrectionResult {
  const selection = select(batch.lengths, batch.mask);
  const { tokens, sequences } = selection.totals;
  const logRatios = TokenArray.constant(selection, batch.oldLogprobs).minus(
    TokenArray.constant(selection, batch.rolloutLogprobs),
  );
  const weights = weightsOf(logRatios, settings);
  const mean = perCount(weights.sum(), tokens).value;
  const ofSequences = settings.level === 'sequence';
  const averaged = ofSequences ? perCount(weights.meanBySequence().sum(), sequences).value : mean;
  // Weights that are all 0 stay 0.
  const normalizer = settings.normalize && averaged > 0 ? averaged : 1;
  const ratios = ofSequences ? sequenceRatios(logRatios, settings) : leveled(logRatios, settings).exp().data;
  return {
    weights: weights.divide(normalizer).expand(),
    statistics: { mean, ...weightStatistics(weights.data, mean), ...ratioStatistics(ratios, settings), normalizer },
  };
}

function sequenceRatios(
  logRatios: TokenArray,
  { logRatioBound = Infinity, sequences = 'non-empty' }: CorrectionWeightSettings,
): Float64Array {
  const { starts } = logRatios.selection;
  const ratios = logRatios.sumBySequence().clip(-logRatioBound, logRatioBound).exp().data;
  return sequences === 'all' ? ratios : ratios.filter((_, b) => starts[b + 1]! > starts[b]!);
}

function weightStatistics(weights: Float64Array, mean: number) {
  const squares = weights.reduce((sum, weight) => sum + weight * weight, 0);
  return {
    ...extremes(weights),
    zeroFraction: fraction(weights, (weight) => weight === 0),
    effectiveSampleSize: squares > 0 ? (mean * mean * weights.length) / squares : 0,
  };
}

function ratioStatistics(ratios: Float64Array, { low = 0, high = defaultHigh }: CorrectionSettings) {
  const { max: maxRatio, min: minRatio } = extremes(ratios);
  const below = low > 0 ? low : 1 / high;
  return {
    maxRatio,
    minRatio,
    highFraction: fraction(ratios, (ratio) => ratio > high),
    lowFraction: fraction(ratios, (ratio) => ratio < below),
  };
}

/** 0 for nothing. */
function extremes(x: Float64Array): { max: number; min: number } {
  if (x.length === 0) return { max: 0, min: 0 };
  return { max: x.reduce((a, b) => Math.max(a, b)), min: x.reduce((a, b) => Math.min(a, b)) };
}

const fraction = (x: Float64Array, is: (value: number) => boolean): number =>
  x.length > 0 ? x.filter(is).length / x.length : 0;

/** A token, or all of a sequence, is kept where low ≤ statistic ≤ high. */
export interface Rejection {
  /**
   * Of KL(π_rollout‖π_old): k1 = −log r, k2 = (log r)²/2, k3 = r − 1 − log r, in nats. verl's band of k1 is that of
   * 1/r.
   */
  readonly estimator: 'k1' | 'k2' | 'k3';
  /** Each token's estimate, or the sum, mean or largest over the sequence. */
  readonly over: keyof typeof rejectionStatistics;
  /** None by default. */
  readonly low?: number | undefined;
  readonly high: number;
}

/** From estimates per token to the number that decides about each token. */
const rejectionStatistics = {
  token: (estimates) => estimates,
  sum: (estimates) => estimates.sumBySequence().overTokens(),
  mean: (estimates) => estimates.meanBySequence().overTokens(),
  max: ({ selection, data }) => {
    const { starts } = selection;
    const largest = new Float64Array(data.length);
    for (let b = 0; b + 1 < starts.length; b++) {
      const [begin, end] = [starts[b]!, starts[b + 1]!];
      largest.fill(extremes(data.subarray(begin, end)).max, begin, end);
    }
    return new TokenArray(selection, largest, 'constant');
  },
} satisfies Record<string, (estimates: TokenArray) => TokenArray>;

export interface RejectionResult {
  /** Packed, 1 at learned tokens that are kept: the mask to learn with, whose totals are then those of the loss. */
  readonly mask: Float64Array;
  /** Fraction of learned tokens that were rejected, and the number of sequences that lost one. */
  readonly rejectedFraction: number;
  readonly rejectedSequences: number;
}

/**
 * Masked importance sampling: the learned tokens that pass every rejection. `logRatioBound` clamps log r to ± that
 * beforehand (off by default; verl: 20).
 */
export function rejectionMask(
  batch: CorrectionInputs,
  rejections: readonly Rejection[],
  { logRatioBound }: { readonly logRatioBound?: number | undefined } = {},
): RejectionResult {
  const selection = select(batch.lengths, batch.mask);
  const rollout = TokenArray.constant(selection, batch.rolloutLogprobs);
  const old = TokenArray.constant(selection, batch.oldLogprobs);
  const passes = rejections.map(({ estimator, over, low = -Infinity, high }) => {
    const { data } = rejectionStatistics[over](klEstimate(rollout, old, estimator, { input: logRatioBound }));
    return data.map((statistic) => (statistic >= low && statistic <= high ? 1 : 0));
  });
  const kept = new Float64Array(selection.positions.length).map((_, i) => (passes.every((pass) => pass[i]) ? 1 : 0));
  const { starts } = selection;
  let rejectedSequences = 0;
  for (let b = 0; b + 1 < starts.length; b++)
    if (kept.subarray(starts[b]!, starts[b + 1]!).includes(0)) rejectedSequences++;
  return {
    mask: expand(selection, kept),
    rejectedFraction: fraction(kept, (keeps) => keeps === 0),
    rejectedSequences,
  };
}

export interface BypassSettings extends PolicyTermSettings, CorrectionSettings {}

/**
 * REINFORCE with the correction inside the loss: −sg(w) A log π with w from π / π_rollout, where the column
 * `oldLogprobs` holds the rollout's log-probs and no third policy is computed. Token mean: `weight`. With PPO the same
 * bypass is `policyLoss` on that column. Rejection is made beforehand, as a mask.
 */
export const bypassReinforce = (settings: BypassSettings): Loss<PolicyColumn> => {
  const weights = (t: SurrogateInputs) => weightsOf(t.logprobs.minus(t.oldLogprobs), settings).stopGradient();
  return policyLossOf(
    {
      tokens: (t) => weights(t).times(t.advantages.negate()).times(t.logprobs),
      statistics: (t) => ({ weight: meanOverTokens(weights(t)) }),
    },
    settings,
  );
};
