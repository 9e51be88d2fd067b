/**
 * Critic-free advantages that differ from token to token. ReMax: Li et al. 2023, arXiv:2310.10505, with the returns of
 * its authors' code; optimal token baseline: verl, after the variance-optimal baseline of Greensmith et al. 2004.
 */
import { groupRows } from './group-advantages.js';
import { compact, expand, type Numbers, select } from './selection.js';

export interface RemaxInputs {
  readonly lengths: Numbers;
  readonly mask: Numbers;
  /** Per token: log π_old − log q, or another estimate of the KL. */
  readonly kl: Numbers;
  /** Per sequence: its score, and that of the greedy answer to the same prompt. */
  readonly scores: Numbers;
  readonly baselines: Numbers;
}

export interface RemaxSettings {
  /** β. */
  readonly beta: number;
  readonly gamma: number;
  /** Clamps the difference of scores to ± this. Off by default. */
  readonly clip?: number | undefined;
  /**
   * Exponent of γ at the last of T learned tokens: 1 (default: the authors' γ^(T−t) for t = 0..T−1) or 0 (γ^(T−1−t)).
   */
  readonly lastExponent?: 0 | 1 | undefined;
}

/**
 * R_t = −β kl_t + γ^(T−t) clip(score − baseline): the KL of a token is not accumulated over those before it. Packed, 0
 * where the mask is 0. With KL in the reward and accumulated: `returnsToGo`, minus the baseline at every token.
 */
export function remaxReturns(
  { lengths, mask, kl, scores, baselines }: RemaxInputs,
  settings: RemaxSettings,
): Float64Array {
  const { beta, gamma, clip = Infinity, lastExponent = 1 } = settings;
  const selection = select(lengths, mask);
  const { starts } = selection;
  const returns = compact(selection, kl).map((x) => -beta * x);
  for (let b = 0; b + 1 < starts.length; b++) {
    const end = starts[b + 1]!;
    let share = gamma ** lastExponent * Math.min(Math.max(scores[b]! - baselines[b]!, -clip), clip);
    for (let i = end - 1; i >= starts[b]!; i--) {
      returns[i]! += share;
      share *= gamma;
    }
  }
  return expand(selection, returns);
}

export interface TokenBaselineInputs {
  readonly lengths: Numbers;
  readonly mask: Numbers;
  /** Per sequence; the answers to one prompt share it. */
  readonly groups: Numbers;
  /** Per token: the return, log π_old of the sampled token, and Σ over the vocabulary of π_old². */
  readonly returns: Numbers;
  readonly logprobs: Numbers;
  readonly sumOfSquares: Numbers;
}

/** Keeps the baseline of a policy without a choice (all w_t are 0) finite. */
const epsilon = 1e-8;

/**
 * A_t = G_t − B_t with B at the t-th learned token = Σ G_t W_t / (Σ W_t + 1e-8) over the group's answers that have one,
 * W_t = Σ up to t of w, w = 1 − 2π + Σπ² (the squared norm of the gradient of log π by the logits). B is 0 where fewer
 * than two answers have a t-th learned token. Packed, 0 where the mask is 0.
 */
export function optimalTokenBaseline(batch: TokenBaselineInputs): Float64Array {
  const selection = select(batch.lengths, batch.mask);
  const { starts } = selection;
  const returns = compact(selection, batch.returns);
  const sumOfSquares = compact(selection, batch.sumOfSquares);
  const weights = compact(selection, batch.logprobs).map((x, i) => 1 - 2 * Math.exp(x) + sumOfSquares[i]!);
  for (let b = 0; b + 1 < starts.length; b++) {
    for (let i = starts[b]! + 1; i < starts[b + 1]!; i++) weights[i]! += weights[i - 1]!;
  }
  const advantages = Float64Array.from(returns);
  for (const rows of groupRows({ groups: batch.groups })) {
    for (let t = 0; ; t++) {
      const tokens = rows.map((row) => starts[row]! + t).filter((i, k) => i < starts[rows[k]! + 1]!);
      if (tokens.length < 2) break;
      const sum = tokens.reduce((total, i) => total + returns[i]! * weights[i]!, 0);
      const baseline = sum / (tokens.reduce((total, i) => total + weights[i]!, 0) + epsilon);
      for (const i of tokens) advantages[i]! -= baseline;
    }
  }
  return expand(selection, advantages);
}
