/**
 * From per-token losses to one number. The same name means different numbers in different frameworks; here every mode
 * divides by the totals of the mini-batch, never by those of a part of it.
 */
import type { Scalar, TokenArray } from './tokens.js';

/** What a sum of token losses is divided by. */
export const aggregationModes = [
  /** Σ l / tokens (PPO, DAPO, REINFORCE++). */
  'token-mean',
  /** Σ l. */
  'token-sum',
  /** Σ over sequences of (Σ l / tokens of the sequence) / sequences (GRPO). */
  'seq-mean-token-mean',
  /** Σ l / sequences (REINFORCE, RLOO). */
  'seq-mean-token-sum',
  /** Σ l / (sequences · horizon); with `sequences: 'all'` the constant normaliser of Dr.GRPO. */
  'seq-mean-token-sum-norm',
] as const;
export type AggregationMode = (typeof aggregationModes)[number];

export interface Aggregation {
  readonly mode: AggregationMode;
  /** The constant length of `seq-mean-token-sum-norm`; 1 by default. */
  readonly horizon?: number | undefined;
  /**
   * Which sequences are counted: those with a learned token (default), all of them (an empty one counts as 0), or no
   * division by their number.
   */
  readonly sequences?: 'non-empty' | 'all' | 'none' | undefined;
}

export const tokenMean: Aggregation = { mode: 'token-mean' };

/** One number from per-token losses; 0 for a batch without a learned token. */
export function aggregate(losses: TokenArray, { mode, horizon = 1, sequences }: Aggregation): Scalar {
  const { totals } = losses.selection;
  const counted = { 'non-empty': totals.sequences, all: totals.rows, none: 1 }[sequences ?? 'non-empty'];
  switch (mode) {
    case 'token-mean':
      return meanOverTokens(losses);
    case 'token-sum':
      return losses.sum();
    case 'seq-mean-token-mean':
      return perCount(losses.meanBySequence().sum(), counted);
    case 'seq-mean-token-sum':
      return perCount(losses.sum(), counted);
    case 'seq-mean-token-sum-norm':
      return perCount(losses.sum(), counted * horizon);
  }
}

/** Σ x / learned tokens of the mini-batch; 0 when there are none. */
export const meanOverTokens = (x: TokenArray): Scalar => perCount(x.sum(), x.selection.totals.tokens);

/** An empty sum over an empty count is 0. */
export const perCount = (sum: Scalar, count: number): Scalar => (count > 0 ? sum.divide(count) : sum);
