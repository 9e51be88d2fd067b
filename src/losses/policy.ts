/**
 * The policy loss of PPO and its relatives, the entropy bonus and the KL loss.
 * Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al. 2020, arXiv:1912.09729; clip-higher: DAPO,
 * arXiv:2503.14476.
 */
import { type Aggregation, aggregate, meanOverTokens, tokenMean } from './aggregation.js';
import { type KlClamp, type KlEstimator, klEstimate } from './kl.js';
import type { Loss, LossInputs } from './loss.js';
import type { Scalar, TokenArray } from './tokens.js';

export interface PolicyLossSettings {
  /** ε: the ratio is clipped to [1 − ε, 1 + ε]. */
  readonly clip: number;
  /** Upper ε when it differs from the lower one (clip-higher). */
  readonly clipHigh?: number | undefined;
  /** c: where A < 0, a token's loss is at most −c·A (dual clip). Off by default. */
  readonly dualClip?: number | undefined;
  /** Clamps log ρ to ± this before exp; the gradient is 0 beyond. Off by default. */
  readonly logRatioBound?: number | undefined;
  /** Token mean by default. */
  readonly aggregation?: Aggregation | undefined;
  /** c_H of −c_H·agg(H); 0 by default. */
  readonly entropyCoefficient?: number | undefined;
  /** Adds coefficient · agg(estimate of KL(π‖reference)) and reads `referenceLogprobs`. */
  readonly kl?: PolicyKlSettings | undefined;
}

export interface PolicyKlSettings {
  readonly coefficient: number;
  readonly estimator: KlEstimator;
  readonly clamp?: KlClamp | undefined;
}

type PolicyColumn = 'logprobs' | 'entropies' | 'oldLogprobs' | 'advantages' | 'referenceLogprobs';
type Surrogate = LossInputs<'logprobs' | 'oldLogprobs' | 'advantages'>;

/** Beyond this, |log π − log π_old| of a token is reported as an outlier. */
const outlierBound = 20;

/** log ρ_t = log π(a_t) − log π_old(a_t), clamped when the settings say so. */
export function logRatio(t: LossInputs<'logprobs' | 'oldLogprobs'>, { logRatioBound }: PolicyLossSettings): TokenArray {
  const difference = t.logprobs.minus(t.oldLogprobs);
  return logRatioBound === undefined ? difference : difference.clip(-logRatioBound, logRatioBound);
}

/**
 * Per token: max( −A ρ, −A clip(ρ, 1 − ε_low, 1 + ε_high) ), and where A < 0 at most −c A with dual clip. The derivative
 * with respect to log π is −A ρ where the unclipped branch is chosen (also at equality), else 0.
 */
export function clippedSurrogate(t: Surrogate, settings: PolicyLossSettings): TokenArray {
  const { unclipped, clipped } = branches(t, settings);
  const surrogate = unclipped.max(clipped);
  if (settings.dualClip === undefined) return surrogate;
  const bounded = surrogate.min(t.advantages.times(-settings.dualClip));
  return bounded.where(t.advantages.lessThan(0), surrogate);
}

/** L = agg(clipped surrogate) − c_H agg(H) + β agg(KL). */
export function policyLoss(settings: PolicyLossSettings): Loss<PolicyColumn> {
  const { aggregation = tokenMean, entropyCoefficient = 0, kl } = settings;
  return {
    couples: 'sequence',
    reads: ['logprobs', 'entropies', 'oldLogprobs', 'advantages', ...(kl ? (['referenceLogprobs'] as const) : [])],
    formula(t) {
      let loss = aggregate(clippedSurrogate(t, settings), aggregation);
      if (entropyCoefficient !== 0) loss = loss.minus(aggregate(t.entropies, aggregation).times(entropyCoefficient));
      if (kl) {
        const divergence = klEstimate(t.logprobs, t.referenceLogprobs, kl.estimator, kl.clamp);
        loss = loss.plus(aggregate(divergence, aggregation).times(kl.coefficient));
      }
      return loss;
    },
    statistics: (t) => ({ ...policyStatistics(t, settings), entropy: meanOverTokens(t.entropies) }),
  };
}

/**
 * Token means: `clipFraction` (the clipped branch is the larger: no gradient), `outsideFraction` (ρ beyond the clip, on
 * whichever side; OpenAI baselines' clip fraction), `dualClipFraction` (−c·A is the smaller), `kl` =
 * (ρ − 1) − log ρ (approximate KL(π_old‖π), never clamped), `klLinear` = −log ρ, `outliers` (|log ρ| > 20), and the
 * loss without bonus and KL as `policyLoss`.
 */
export function policyStatistics(t: Surrogate, settings: PolicyLossSettings): Record<string, Scalar> {
  const { aggregation = tokenMean, dualClip, clip, clipHigh = clip } = settings;
  const { ratio, unclipped, clipped } = branches(t, settings);
  const difference = t.logprobs.minus(t.oldLogprobs);
  const larger = unclipped.max(clipped);
  const bounded = larger.greaterThan(t.advantages.times(-(dualClip ?? Infinity)));
  return {
    policyLoss: aggregate(clippedSurrogate(t, settings), aggregation),
    clipFraction: meanOverTokens(clipped.greaterThan(unclipped)),
    outsideFraction: meanOverTokens(ratio.lessThan(1 - clip).plus(ratio.greaterThan(1 + clipHigh))),
    dualClipFraction: meanOverTokens(bounded.times(t.advantages.lessThan(0))),
    kl: meanOverTokens(difference.exp().minus(1).minus(difference)),
    klLinear: meanOverTokens(logRatio(t, settings).negate()),
    outliers: meanOverTokens(difference.abs().greaterThan(outlierBound)),
  };
}

function branches(t: Surrogate, settings: PolicyLossSettings) {
  const { clip, clipHigh = clip } = settings;
  const ratio = logRatio(t, settings).exp();
  const benefit = t.advantages.negate();
  return { ratio, unclipped: ratio.times(benefit), clipped: ratio.clip(1 - clip, 1 + clipHigh).times(benefit) };
}
