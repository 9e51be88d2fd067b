/**
 * Estimates of KL(π‖reference) from tokens sampled from π, and the KL penalty inside the reward.
 * Schulman 2020, joschu.net/blog/kl-approx.html; KL in the reward: Ziegler et al. 2019, arXiv:1909.08593.
 *
 * As a loss, the expected gradient of k1 is 0, that of k2 is ∇KL(π‖reference), that of k3 is ∇KL(reference‖π).
 */
import { perCount } from './aggregation.js';
import { type Numbers, select } from './selection.js';
import { TokenArray } from './tokens.js';

/** With d = log π − log reference: k1 = d, k2 = d²/2, k3 = e^−d − 1 + d, abs = |d|; `+` has the gradient of k2. */
export type KlEstimator = 'k1' | 'k2' | 'k3' | 'abs' | 'k1+' | 'k3+';

/** Bounds on d and on the estimate; the gradient is 0 beyond them. None by default. */
export interface KlClamp {
  readonly input?: number | undefined;
  readonly output?: number | undefined;
}

/** Beyond this, |log π − log reference| of a token is reported as an outlier. */
const outlierBound = 10;

/** One estimate per token, in nats, differentiable in both arguments. */
export function klEstimate(
  logprobs: TokenArray,
  reference: TokenArray,
  estimator: KlEstimator,
  { input, output }: KlClamp = {},
): TokenArray {
  const difference = logprobs.minus(reference);
  const d = input === undefined ? difference : difference.clip(-input, input);
  const estimate = estimates[estimator](d);
  const value = output === undefined ? estimate : estimate.clip(-output, output);
  return estimator.endsWith('+') ? value.withGradientOf(estimates.k2(difference)) : value;
}

const k3 = (d: TokenArray) => d.negate().exp().minus(1).plus(d);
const estimates: Record<KlEstimator, (d: TokenArray) => TokenArray> = {
  k1: (d) => d,
  k2: (d) => d.square().times(0.5),
  k3,
  abs: (d) => d.abs(),
  'k1+': (d) => d,
  'k3+': k3,
};

/**
 * ρ · estimate: unbiased when the tokens were sampled from an older policy (DeepSeek-V3.2). The gradient flows through the
 * ratio too.
 */
export const importanceWeighted = (estimate: TokenArray, logprobs: TokenArray, oldLogprobs: TokenArray): TokenArray =>
  logprobs.minus(oldLogprobs).exp().times(estimate);

export interface KlPenaltySettings {
  /** β. */
  readonly coefficient: number;
  readonly estimator: KlEstimator;
  readonly clamp?: KlClamp | undefined;
  /** Clamps each token's score to ± this before the penalty (DeepSpeed-Chat). Off by default. */
  readonly scoreBound?: number | undefined;
  /** Clamps each token's score and penalty together to ± this (Safe-RLHF's code). Off by default. */
  readonly rewardBound?: number | undefined;
  /** Sequences that the mean KL is over: those with a learned token (default), or all, an empty one counting as 0. */
  readonly sequences?: 'non-empty' | 'all' | undefined;
}

export interface KlPenaltyInputs {
  readonly lengths: Numbers;
  readonly mask: Numbers;
  /** Per-token scores: that of the answer at its last token, those of steps at theirs. */
  readonly scores: Numbers;
  /** log π_old of the sampled tokens, and the reference's. */
  readonly logprobs: Numbers;
  readonly reference: Numbers;
}

export interface KlPenalty {
  /** Packed, 0 where the mask is 0. */
  readonly rewards: Float64Array;
  readonly kl: Float64Array;
  /** Mean over sequences of the mean over their tokens: nats per token. */
  readonly mean: number;
  /** Mean over sequences of the sum over their tokens: nats per answer. */
  readonly perSequence: number;
  /** Fraction of learned tokens with |d| > 10. */
  readonly outliers: number;
}

/** r_t = score_t − β · kl_t on learned tokens. */
export function klPenalty(batch: KlPenaltyInputs, settings: KlPenaltySettings): KlPenalty {
  const selection = select(batch.lengths, batch.mask);
  const logprobs = TokenArray.constant(selection, batch.logprobs);
  const reference = TokenArray.constant(selection, batch.reference);
  const scores = TokenArray.constant(selection, batch.scores);
  const kl = klEstimate(logprobs, reference, settings.estimator, settings.clamp);
  const { scoreBound = Infinity, rewardBound = Infinity } = settings;
  const bounded = scores.clip(-scoreBound, scoreBound);
  // A weight of 0 means no penalty, also where the estimate is infinite.
  const penalised = settings.coefficient === 0 ? bounded : bounded.minus(kl.times(settings.coefficient));
  const rewards = penalised.clip(-rewardBound, rewardBound);
  const { tokens, sequences, rows } = selection.totals;
  const counted = settings.sequences === 'all' ? rows : sequences;
  const outliers = logprobs.minus(reference).abs().greaterThan(outlierBound).sum().value;
  return {
    rewards: rewards.expand(),
    kl: kl.expand(),
    mean: perCount(kl.meanBySequence().sum(), counted).value,
    perSequence: perCount(kl.sum(), counted).value,
    outliers: tokens > 0 ? outliers / tokens : 0,
  };
}
