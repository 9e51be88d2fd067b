/** Pairs of answers to one prompt: rows 2i and 2i + 1 of a batch are the chosen and the rejected one. */
import { perCount } from './aggregation.js';
import type { Selection } from './selection.js';
import type { Scalar, SequenceArray } from './tokens.js';

/** One number per pair for either side. */
export interface Pairs {
  readonly chosen: SequenceArray;
  readonly rejected: SequenceArray;
}

/** Splits numbers per sequence into the two sides of the pairs. */
export function pairs(perSequence: SequenceArray): Pairs {
  const count = Math.floor(perSequence.data.length / 2);
  return {
    chosen: perSequence.gather(Int32Array.from({ length: count }, (_, i) => 2 * i)),
    rejected: perSequence.gather(Int32Array.from({ length: count }, (_, i) => 2 * i + 1)),
  };
}

/** Σ over pairs / pairs of the mini-batch. */
export const meanOverPairs = (perPair: SequenceArray, { totals }: Selection): Scalar =>
  perCount(perPair.sum(), totals.rows / 2);
