/**
 * Repetition: −(1 − distinct n-grams / n-grams) over the response's token ids; 0 for a response that repeats none or is shorter than n.
 * Distinct n-grams are the measure of diversity of Li et al. [1510.03055].
 */
import type { RewardFunction } from '../reward-function.js';
import { each } from './samples.js';

export interface RepetitionSettings {
  /** n. */
  readonly ngram: number;
}

export function repetition({ ngram }: RepetitionSettings): RewardFunction {
  return each(({ tokens }) => repetitionOf(tokens, ngram));
}

/** distinct n-grams / n-grams − 1; 0 without one. */
export function repetitionOf(tokens: ArrayLike<number>, ngram: number): number {
  const ids = Array.from(tokens);
  const count = ids.length - ngram + 1;
  if (count < 1) return 0;
  const distinct = new Set(Array.from({ length: count }, (_, i) => ids.slice(i, i + ngram).join()));
  return distinct.size / count - 1;
}
