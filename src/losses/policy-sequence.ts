/**
 * Policy losses with one importance ratio per sequence; every learned token of a sequence has the sequence's loss, so
 * that all aggregations are defined. With `seq-mean-token-mean`, their default, a sequence counts once. GSPO: Zheng et
 * al. 2025, arXiv:2507.18071; GMPO: Zhao et al. 2025, arXiv:2507.20673; RLOO: Ahmadian et al. 2024, arXiv:2402.14740,
 * with the clip of TRL's trainer.
 */
import { type Aggregation, meanOverTokens } from './aggregation.js';
import type { Loss } from './loss.js';
import {
  type ClipSettings,
  clippedBy,
  logRatio,
  type PolicyColumn,
  type PolicyTermSettings,
  policyLossOf,
  type Surrogate,
  type SurrogateInputs,
} from './policy.js';
import type { SequenceArray, TokenArray } from './tokens.js';

const sequenceMean: Aggregation = { mode: 'seq-mean-token-mean' };

export interface SequenceClipSettings extends PolicyTermSettings, ClipSettings {
  /** Upper bound of a sequence's log ratio before exp; the gradient is 0 beyond. Off by default (verl's GSPO: 10). */
  readonly sequenceLogRatioBound?: number | undefined;
}

/**
 * GSPO, eq. 5 and 7: s = exp( mean over the sequence of log ρ_t ), loss max( −A s, −A clip(s) ). Its derivative with
 * respect to log π_t is −A s / |o| for each token, times the sequence's weight. `weighted` multiplies the tokens' equal
 * losses, so the mean of a sequence's weights is what counts.
 */
export const gspo = (settings: SequenceClipSettings): Loss<PolicyColumn> =>
  sequenceClipped((logRatios) => logRatios.meanBySequence(), settings);

/**
 * RLOO: R = exp( Σ over the sequence of log ρ_t ), loss max( −A R, −A clip(R) ). TRL gives a sequence without a learned
 * token the ratio 1, a constant −A in its mean; here it has no tokens and no loss.
 */
export const rloo = (settings: SequenceClipSettings): Loss<PolicyColumn> =>
  sequenceClipped((logRatios) => logRatios.sumBySequence(), settings);

function sequenceClipped(
  reduce: (logRatios: TokenArray) => SequenceArray,
  settings: SequenceClipSettings,
): Loss<PolicyColumn> {
  const { sequenceLogRatioBound = Infinity } = settings;
  const ratio = (t: SurrogateInputs) => reduce(logRatio(t, settings)).min(sequenceLogRatioBound).exp().overTokens();
  return policyLossOf(clippedBy(ratio, settings), settings, sequenceMean);
}

export interface GmpoSettings extends PolicyTermSettings {
  /** ε: log ρ of a token is clipped to [−ε, ε] (the paper: 0.4). */
  readonly clip: number;
  readonly clipHigh?: number | undefined;
}

/**
 * GMPO: the geometric mean of clipped ratios, −A exp( mean over the sequence of l_t ), with l_t = log ρ_t clipped to
 * [−ε_low, ε_high] from above where A > 0, from below where A < 0. Token means: `clipFraction` (l_t is the bound),
 * `outsideFraction` (log ρ_t beyond a bound, on whichever side).
 */
export function gmpo(settings: GmpoSettings): Loss<PolicyColumn> {
  const { clip, clipHigh = clip } = settings;
  const clipped = (x: TokenArray, advantages: TokenArray) => {
    const bounded = x.clip(-clip, clipHigh);
    const negative = x.max(bounded).where(advantages.lessThan(0), 0);
    return x.min(bounded).where(advantages.greaterThan(0), negative);
  };
  const surrogate: Surrogate = {
    tokens: (t) =>
      clipped(logRatio(t, settings), t.advantages).meanBySequence().exp().overTokens().times(t.advantages.negate()),
    statistics(t) {
      const x = logRatio(t, settings);
      const moved = x.minus(clipped(x, t.advantages)).abs().times(t.advantages.abs());
      return {
        clipFraction: meanOverTokens(moved.greaterThan(0)),
        outsideFraction: meanOverTokens(x.lessThan(-clip).plus(x.greaterThan(clipHigh))),
      };
    },
  };
  return policyLossOf(surrogate, settings, sequenceMean);
}
