/** The weighted sum of several terms of a reward. */
import { lastSampled } from '../data/rollout.js';
import type { SpreadRewards } from './spread-rewards.js';

export interface WeightedRewards {
  readonly weight: number;
  readonly rewards: SpreadRewards;
}

/**
 * Scores add up, and so do rewards of tokens. Where one term lies on tokens, the score of a term that does not is added at the last
 * sampled position of its sequence; a sequence without any has no place for it.
 *
 * @param sampled over the packed positions: 1 where the next token was sampled
 */
export function combineRewards(
  terms: readonly WeightedRewards[],
  lengths: ArrayLike<number>,
  sampled: ArrayLike<number>,
): SpreadRewards {
  const scores = new Float64Array(lengths.length);
  for (const { weight, rewards } of terms) addTo(scores, rewards.scores, weight);
  if (terms.every(({ rewards }) => !rewards.tokens)) return { scores };

  const tokens = new Float64Array(sampled.length);
  const last = lastSampled(lengths, sampled);
  for (const { weight, rewards } of terms) {
    if (rewards.tokens) addTo(tokens, rewards.tokens, weight);
    else for (const [row, t] of last.entries()) if (t >= 0) tokens[t]! += weight * rewards.scores[row]!;
  }
  return { scores, tokens };
}

function addTo(sum: Float64Array, values: Float64Array, weight: number): void {
  for (let i = 0; i < sum.length; i++) sum[i]! += weight * values[i]!;
}
