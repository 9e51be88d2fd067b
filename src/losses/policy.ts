/**
 * What all policy losses share (aggregation, entropy bonus, KL loss, importance weights), and the clipped surrogate of
 * PPO. Schulman et al. 2017, arXiv:1707.06347, eq. 7; dual clip: Ye et al. 2020, arXiv:1912.09729; clip-higher: DAPO,
 * arXiv:2503.14476.
 */
import { type Aggregation, aggregate, meanOverTokens, tokenMean } from './aggregation.js';
import { type KlClamp, type KlEstimator, klEstimate } from './kl.js';
import type { Loss, LossInputs } from './loss.js';
import type { Scalar, TokenArray } from './tokens.js';

/** What every policy loss has beside its surrogate. */
export interface PolicyTermSettings {
  /** Clamps log ρ to ± this before exp; the gradient is 0 beyond. Off by default. */
  readonly logRatioBound?: number | undefined;
  /** Token mean by default; losses of one ratio per sequence say theirs. */
  readonly aggregation?: Aggregation | undefined;
  /** c_H of −c_H·agg(H); 0 by default. */
  readonly entropyCoefficient?: number | undefined;
  /** Adds coefficient · agg(estimate of KL(π‖reference)) and reads `referenceLogprobs`. */
  readonly kl?: PolicyKlSettings | undefined;
  /**
   * Multiplies each token's surrogate by the column `weights` (rollout correction) before the aggregation. Off by
   * default.
   */
  readonly weighted?: boolean | undefined;
}

export interface ClipSettings {
  /** ε: the ratio is clipped to [1 − ε, 1 + ε]. */
  readonly clip: number;
  /** Upper ε when it differs from the lower one (clip-higher). */
  readonly clipHigh?: number | undefined;
  /** c: where A < 0, a token's loss is at most −c·A (dual clip). Off by default. */
  readonly dualClip?: number | undefined;
}

export interface PolicyLossSettings extends PolicyTermSettings, ClipSettings {}

export interface PolicyKlSettings {
  readonly coefficient: number;
  readonly estimator: KlEstimator;
  readonly clamp?: KlClamp | undefined;
}

/** Model outputs and columns that policy losses read; which of them, each loss says. */
export type PolicyColumn =
  | 'logprobs'
  | 'entropies'
  | 'oldLogprobs'
  | 'advantages'
  | 'referenceLogprobs'
  | 'weights'
  | 'selected';
export type SurrogateInputs = LossInputs<'logprobs' | 'oldLogprobs' | 'advantages'>;

/** The part in which policy losses differ: a loss per token, before weights and aggregation. */
export interface Surrogate {
  /** Columns beside the log-probs and the advantages. */
  readonly reads?: readonly PolicyColumn[] | undefined;
  tokens(t: LossInputs<PolicyColumn>): TokenArray;
  /** Token means that only this surrogate has. */
  statistics?(t: LossInputs<PolicyColumn>): Readonly<Record<string, Scalar>>;
}

/** Beyond this, |log π − log π_old| of a token is reported as an outlier. */
const outlierBound = 20;

/** log ρ_t = log π(a_t) − log π_old(a_t), clamped when the settings say so. */
export function logRatio(t: LossInputs<'logprobs' | 'oldLogprobs'>, { logRatioBound }: PolicyTermSettings): TokenArray {
  const difference = t.logprobs.minus(t.oldLogprobs);
  return logRatioBound === undefined ? difference : difference.clip(-logRatioBound, logRatioBound);
}

/**
 * L = agg(w · surrogate) − c_H agg(H) + β agg(KL); w is 1 unless `weighted`, agg that of the settings or the default.
 *
 * Statistics, token means: those of the surrogate, `entropy`, `kl` = (ρ − 1) − log ρ (approximate KL(π_old‖π), never
 * clamped), `klLinear` = −log ρ, `outliers` (|log ρ| > 20); and agg(w · surrogate) as `policyLoss`.
 */
export function policyLossOf(
  surrogate: Surrogate,
  settings: PolicyTermSettings,
  byDefault: Aggregation = tokenMean,
): Loss<PolicyColumn> {
  const { aggregation = byDefault, entropyCoefficient = 0, kl, weighted = false } = settings;
  // A weight of 0 leaves a token out, also where its surrogate is infinite.
  const tokens = weighted
    ? (t: LossInputs<PolicyColumn>) => surrogate.tokens(t).times(t.weights).where(t.weights, 0)
    : surrogate.tokens;
  return {
    couples: 'sequence',
    reads: [
      ...(['logprobs', 'entropies', 'oldLogprobs', 'advantages'] as const),
      ...(surrogate.reads ?? []),
      ...(kl ? (['referenceLogprobs'] as const) : []),
      ...(weighted ? (['weights'] as const) : []),
    ],
    formula(t) {
      let loss = aggregate(tokens(t), aggregation);
      if (entropyCoefficient !== 0) loss = loss.minus(aggregate(t.entropies, aggregation).times(entropyCoefficient));
      if (kl) {
        const divergence = klEstimate(t.logprobs, t.referenceLogprobs, kl.estimator, kl.clamp);
        loss = loss.plus(aggregate(divergence, aggregation).times(kl.coefficient));
      }
      return loss;
    },
    statistics(t) {
      const difference = t.logprobs.minus(t.oldLogprobs);
      return {
        ...surrogate.statistics?.(t),
        policyLoss: aggregate(tokens(t), aggregation),
        kl: meanOverTokens(difference.exp().minus(1).minus(difference)),
        klLinear: meanOverTokens(logRatio(t, settings).negate()),
        outliers: meanOverTokens(difference.abs().greaterThan(outlierBound)),
        entropy: meanOverTokens(t.entropies),
      };
    },
  };
}

/**
 * Per token: max( −A ρ, −A clip(ρ, 1 − ε_low, 1 + ε_high) ), and where A < 0 at most −c A with dual clip. The
 * derivative with respect to log π is −A ρ where the unclipped branch is chosen (also at equality), else 0.
 */
export const clippedSurrogate = (t: SurrogateInputs, settings: PolicyLossSettings): TokenArray =>
  clippedTokens(logRatio(t, settings).exp(), t.advantages, settings);

/** PPO: agg(clipped surrogate) and the terms of `policyLossOf`, with the statistics of `clippedBy`. */
export const policyLoss = (settings: PolicyLossSettings): Loss<PolicyColumn> =>
  policyLossOf(
    clippedBy((t) => logRatio(t, settings).exp(), settings),
    settings,
  );

/**
 * The clipped surrogate of any ratio, of a token or of a sequence. Token means: `clipFraction` (the clipped branch is
 * the larger: no gradient), `outsideFraction` (ρ beyond the clip, on whichever side; OpenAI baselines' clip fraction),
 * `dualClipFraction` (−c·A is the smaller).
 */
export function clippedBy(ratioOf: (t: SurrogateInputs) => TokenArray, settings: ClipSettings): Surrogate {
  const { dualClip = Infinity, clip, clipHigh = clip } = settings;
  return {
    tokens: (t) => clippedTokens(ratioOf(t), t.advantages, settings),
    statistics(t) {
      const ratio = ratioOf(t);
      const { unclipped, clipped } = branches(ratio, t.advantages, settings);
      const bounded = unclipped.max(clipped).greaterThan(t.advantages.times(-dualClip));
      return {
        clipFraction: meanOverTokens(clipped.greaterThan(unclipped)),
        outsideFraction: meanOverTokens(ratio.lessThan(1 - clip).plus(ratio.greaterThan(1 + clipHigh))),
        dualClipFraction: meanOverTokens(bounded.times(t.advantages.lessThan(0))),
      };
    },
  };
}

function clippedTokens(ratio: TokenArray, advantages: TokenArray, settings: ClipSettings): TokenArray {
  const { unclipped, clipped } = branches(ratio, advantages, settings);
  const surrogate = unclipped.max(clipped);
  if (settings.dualClip === undefined) return surrogate;
  const bounded = surrogate.min(advantages.times(-settings.dualClip));
  return bounded.where(advantages.lessThan(0), surrogate);
}

function branches(ratio: TokenArray, advantages: TokenArray, { clip, clipHigh = clip }: ClipSettings) {
  const benefit = advantages.negate();
  return { unclipped: ratio.times(benefit), clipped: ratio.clip(1 - clip, 1 + clipHigh).times(benefit) };
}
