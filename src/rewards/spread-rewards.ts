/** From rewards of samples to numbers over packed tokens. */
import type { Reward } from './reward-function.js';

export interface SpreadRewards {
  /** Per sequence: the number, the total, or the sum of the token rewards. */
  readonly scores: Float64Array;
  /**
   * Over the packed tokens, entry t for the prediction of token t+1; undefined when every reward is one number. Step
   * rewards need not add up to the total. Algorithms with returns per token learn from the steps, and report the total; those that
   * learn from scores alone (grpo, rloo, remax with klReturn token, reinforce++ with baseline) learn from the total.
   */
  readonly tokens?: Float64Array | undefined;
}

/** Spreads one reward per sequence, of `promptLengths[b]` prompt tokens and the rest response, at least one of each. */
export function spreadRewards(
  rewards: readonly Reward[],
  lengths: ArrayLike<number>,
  promptLengths: ArrayLike<number>,
): SpreadRewards {
  const scores = Float64Array.from(rewards, totalOf);
  if (rewards.every((reward) => typeof reward === 'number')) return { scores };
  const tokens = new Float64Array(Array.from(lengths).reduce((sum, length) => sum + length, 0));
  let start = 0;
  rewards.forEach((reward, b) => {
    // Response token j of the sequence is predicted one position before it stands.
    const first = start + promptLengths[b]! - 1;
    for (const [j, amount] of placed(reward, lengths[b]! - promptLengths[b]!)) tokens[first + j] = amount;
    start += lengths[b]!;
  });
  return { scores, tokens };
}

const totalOf = (reward: Reward): number => {
  if (typeof reward === 'number') return reward;
  return 'total' in reward ? reward.total : reward.reduce((sum, x) => sum + x, 0);
};

/** Response tokens that a reward lies on, with their part of it. */
function placed(reward: Reward, length: number): [number, number][] {
  if (typeof reward === 'number') return length > 0 ? [[length - 1, reward]] : [];
  if ('total' in reward) return reward.steps.map((step) => [step.end - 1, step.reward]);
  return reward.map((amount, j) => [j, amount]);
}
