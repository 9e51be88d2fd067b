/** Packed batches: sequences one after the other, no padding; and their split into micro-batches. */
import { LockstepError } from '../errors.js';

/** B sequences of T tokens together; sequence b starts where b - 1 ends. */
export interface TokenBatch {
  /** [T] */
  readonly tokens: Int32Array;
  /** [B], each at least 1; they add up to T. */
  readonly lengths: Int32Array;
}

/** Rows [begin, end) of a batch. */
export interface RowRange {
  begin: number;
  end: number;
}

/**
 * `rows` in `count` contiguous ranges of whole groups; earlier ones have one group more when they do not divide evenly. It decides
 * which rows a data-parallel or generation replica gets, wherever a batch is cut. Errors: `BATCH_INVALID`.
 */
export function evenRanges(rows: number, count: number, groupSize = 1): RowRange[] {
  if (rows % groupSize !== 0) {
    throw new LockstepError(
      'BATCH_INVALID',
      `${rows} rows are not whole groups of ${groupSize}; expected a multiple of groupSize.`,
      { rows, groupSize },
    );
  }
  const groups = rows / groupSize;
  const begin = (part: number) => groupSize * (part * Math.floor(groups / count) + Math.min(part, groups % count));
  return Array.from({ length: count }, (_, part) => ({ begin: begin(part), end: begin(part + 1) }));
}

export interface MicroBatchOptions {
  /** This many consecutive rows stay together (a pair: 2; the samples of a prompt). Default 1. */
  group?: number;
}

/** Packs sequences in order. Errors: `BATCH_INVALID` for an empty sequence. */
export function packBatch(sequences: readonly Int32Array[]): TokenBatch {
  const lengths = Int32Array.from(sequences, (sequence) => sequence.length);
  const empty = lengths.indexOf(0);
  if (empty >= 0) {
    throw new LockstepError('BATCH_INVALID', `Sequence ${empty} of the batch has no tokens; expected at least one.`, {
      sequence: empty,
    });
  }
  const tokens = new Int32Array(lengths.reduce((sum, length) => sum + length, 0));
  let at = 0;
  for (const sequence of sequences) {
    tokens.set(sequence, at);
    at += sequence.length;
  }
  return { tokens, lengths };
}

/**
 * Splits rows, in order, into micro-batches of at most `microTokens` tokens, as many rows each as fit. A sequence counts with its
 * length padded to even, as bfloat16 products see it. A group that is larger alone has a micro-batch to itself.
 * Errors: `BATCH_INVALID` when the rows are not whole groups.
 */
export function microBatches(
  lengths: ArrayLike<number>,
  microTokens: number,
  { group = 1 }: MicroBatchOptions = {},
): RowRange[] {
  if (!Number.isInteger(group) || group < 1 || lengths.length % group !== 0) {
    throw new LockstepError(
      'BATCH_INVALID',
      `${lengths.length} rows cannot be split into groups of ${group}; expected a multiple of the group size.`,
      { rows: lengths.length, group },
    );
  }
  const ranges: RowRange[] = [];
  let begin = 0;
  let total = 0;
  for (let row = 0; row < lengths.length; row += group) {
    let size = 0;
    for (let i = row; i < row + group; i++) size += evenLength(lengths[i]!);
    if (row > begin && total + size > microTokens) {
      ranges.push({ begin, end: row });
      begin = row;
      total = 0;
    }
    total += size;
  }
  if (lengths.length > begin) ranges.push({ begin, end: lengths.length });
  return ranges;
}

/** A sequence's length padded to even. */
export function evenLength(length: number): number {
  return length + (length & 1);
}
