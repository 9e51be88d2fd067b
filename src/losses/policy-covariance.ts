/**
 * Policy losses that keep entropy up by treating the few tokens of high covariance between log-prob and advantage
 * apart. Clip-Cov and KL-Cov: Cui et al. 2025, arXiv:2505.22617.
 *
 * Which tokens these are is a statement about a whole mini-batch, so it cannot be part of a formula that is added up
 * over micro-batches. It is made beforehand, by `selectForClip` or `selectForKl` over the mini-batch, and handed to the
 * loss as the column `selected`. The papers' selection has the log-probs of π at the update, which takes a forward pass
 * over the mini-batch first; made from the rollout's log-probs it is the same at the first update after a rollout, and
 * stays as it was at later ones.
 */
import { shuffledRows } from '../data/sampler.js';
import { meanOverTokens } from './aggregation.js';
import type { Loss } from './loss.js';
import {
  type ClipSettings,
  clippedBy,
  clippedSurrogate,
  logRatio,
  type PolicyColumn,
  type PolicyLossSettings,
  type PolicyTermSettings,
  policyLossOf,
} from './policy.js';
import { expand, type Numbers, type Selection, select } from './selection.js';
import { TokenArray } from './tokens.js';

/** Packed arrays of one mini-batch. */
export interface CovarianceInputs {
  readonly lengths: Numbers;
  readonly mask: Numbers;
  readonly logprobs: Numbers;
  readonly advantages: Numbers;
}

/** (A_t − mean A)(log π_t − mean log π) of the learned tokens, with means over them. */
function covarianceOf(selection: Selection, { logprobs, advantages }: CovarianceInputs): Float64Array {
  const centred = (packed: Numbers) => {
    const x = TokenArray.constant(selection, packed);
    return x.minus(meanOverTokens(x).value);
  };
  return centred(advantages).times(centred(logprobs)).data;
}

export interface ClipSelectionSettings extends ClipSettings {
  /** Bounds of the covariance; the paper has 1 and 5 for models of 7 billion parameters. */
  readonly low: number;
  readonly high: number;
  /**
   * Fraction of the learned tokens that is taken at random from those within the bounds, at least one; the paper: 2e-4.
   */
  readonly ratio: number;
  /** The draw is a function of the seed and the number of candidates. */
  readonly seed: number;
}

/**
 * The tokens that Clip-Cov leaves out, as a packed 0/1 array: max(1, ⌊ratio · tokens⌋) drawn from those with
 * low < covariance < high that the clip has not stopped already; all of those when they are fewer.
 */
export function selectForClip(
  batch: CovarianceInputs & { readonly oldLogprobs: Numbers },
  settings: ClipSelectionSettings,
): Float64Array {
  const selection = select(batch.lengths, batch.mask);
  const covariance = covarianceOf(selection, batch);
  const constant = (packed: Numbers) => TokenArray.constant(selection, packed);
  const inputs = {
    logprobs: constant(batch.logprobs),
    oldLogprobs: constant(batch.oldLogprobs),
    advantages: constant(batch.advantages),
  };
  const unclipped = logRatio(inputs, {}).exp().times(inputs.advantages.negate()).data;
  const larger = clippedSurrogate(inputs, { ...settings, dualClip: undefined }).data;
  const candidates = [...covariance.keys()].filter(
    (i) => covariance[i]! > settings.low && covariance[i]! < settings.high && !(larger[i]! > unclipped[i]!),
  );
  const order = shuffledRows(candidates.length, settings.seed, 0);
  const drawn = order.subarray(0, take(selection, settings.ratio));
  return chosen(
    selection,
    Array.from(drawn, (i) => candidates[i]!),
  );
}

/** The max(1, ⌊ratio · tokens⌋) tokens of largest covariance, as a packed 0/1 array; of equal ones the earlier. */
export function selectForKl(batch: CovarianceInputs, { ratio }: { readonly ratio: number }): Float64Array {
  const selection = select(batch.lengths, batch.mask);
  const covariance = covarianceOf(selection, batch);
  const order = [...covariance.keys()].sort((a, b) => covariance[b]! - covariance[a]! || a - b);
  return chosen(selection, order.slice(0, take(selection, ratio)));
}

const take = ({ positions }: Selection, ratio: number): number => Math.max(1, Math.floor(ratio * positions.length));

function chosen(selection: Selection, indices: readonly number[]): Float64Array {
  const marks = new Float64Array(selection.positions.length);
  for (const i of indices) marks[i] = 1;
  return expand(selection, marks);
}

/**
 * Clip-Cov: the clipped surrogate, 0 without a gradient where the column `selected` is 1. Adds to the statistics of PPO
 * the token mean `selectedFraction`.
 */
export function clipCov(settings: PolicyLossSettings): Loss<PolicyColumn> {
  const clipped = clippedBy((t) => logRatio(t, settings).exp(), settings);
  return policyLossOf(
    {
      reads: ['selected'],
      tokens: (t) => clipped.tokens(t).where(t.selected.lessThan(1), 0),
      statistics: (t) => ({ ...clipped.statistics?.(t), selectedFraction: meanOverTokens(t.selected) }),
    },
    settings,
  );
}

export interface KlCovSettings extends PolicyTermSettings {
  /** Weight of |log ρ| at the selected tokens; 1 by default. */
  readonly coefficient?: number | undefined;
}

/**
 * KL-Cov: −A ρ, plus coefficient · |log ρ| where the column `selected` is 1. Token means: `selectedFraction`, and
 * `klAbsolute` = |log ρ|.
 */
export function klCov(settings: KlCovSettings = {}): Loss<PolicyColumn> {
  const { coefficient = 1 } = settings;
  return policyLossOf(
    {
      reads: ['selected'],
      tokens(t) {
        const x = logRatio(t, settings);
        const surrogate = x.exp().times(t.advantages.negate());
        return surrogate.plus(x.abs().times(coefficient)).where(t.selected, surrogate);
      },
      statistics: (t) => ({
        selectedFraction: meanOverTokens(t.selected),
        klAbsolute: meanOverTokens(logRatio(t, settings).abs()),
      }),
    },
    settings,
  );
}
