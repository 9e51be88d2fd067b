/** Which tokens of a packed batch a loss learns from, and the counts that it may divide by. */
import { LockstepError } from '../errors.js';

export type Numbers = ArrayLike<number>;

/** Counts over the whole mini-batch, all micro-batches and ranks: the only normalisers a loss may divide by. */
export interface Totals {
  /** Learned tokens. */
  readonly tokens: number;
  /** Sequences with at least one learned token. */
  readonly sequences: number;
  /** All sequences, those without a learned token included. */
  readonly rows: number;
  /** Learned tokens of rows 0, 2, 4, ...: those of the chosen answers where rows are pairs. */
  readonly chosenTokens: number;
}

/** Which positions of a packed batch are learned, sequence by sequence. */
export interface Selection {
  /** Packed length: the sum of the sequences' lengths. */
  readonly length: number;
  /** Learned positions in the packed array, ascending. */
  readonly positions: Int32Array;
  /** Learned tokens of sequence b are `positions[starts[b] .. starts[b + 1])`; one entry more than sequences. */
  readonly starts: Int32Array;
  readonly totals: Totals;
}

/**
 * Selects the positions of a packed batch whose mask is not 0. `totals` are those of the mini-batch that this batch is
 * a part of; without them the batch is the whole. Throws `LOSS_SHAPE` when mask and lengths disagree.
 */
export function select(lengths: Numbers, mask: Numbers, totals?: Totals): Selection {
  const starts = new Int32Array(lengths.length + 1);
  const positions = new Int32Array(mask.length);
  let end = 0;
  let count = 0;
  for (let b = 0, t = 0; b < lengths.length; b++) {
    for (end += lengths[b]!; t < end; t++) if (mask[t]) positions[count++] = t;
    starts[b + 1] = count;
  }
  if (end !== mask.length) {
    throw new LockstepError(
      'LOSS_SHAPE',
      `A packed batch has ${end} tokens by its lengths, but its mask has ${mask.length}; give one mask entry per token.`,
      { expected: end, received: mask.length },
    );
  }
  const own = { length: end, positions: positions.slice(0, count), starts };
  return { ...own, totals: totals ?? countTotals(starts) };
}

/** Adds up the totals of the parts (micro-batches, ranks) of one mini-batch; `chosenTokens` wants pairs kept whole. */
export function addTotals(parts: readonly Totals[]): Totals {
  const sum = { tokens: 0, sequences: 0, rows: 0, chosenTokens: 0 };
  for (const part of parts) {
    sum.tokens += part.tokens;
    sum.sequences += part.sequences;
    sum.rows += part.rows;
    sum.chosenTokens += part.chosenTokens;
  }
  return sum;
}

function countTotals(starts: Int32Array): Totals {
  const rows = starts.length - 1;
  let sequences = 0;
  let chosenTokens = 0;
  for (let b = 0; b < rows; b++) {
    const tokens = starts[b + 1]! - starts[b]!;
    if (tokens > 0) sequences++;
    if (b % 2 === 0) chosenTokens += tokens;
  }
  return { tokens: starts[rows]!, sequences, rows, chosenTokens };
}

/** into[b] += Σ of sequence b's entries. */
export function collect(starts: Int32Array, data: Float64Array, into: Float64Array): Float64Array {
  for (let b = 0; b < into.length; b++) {
    for (let i = starts[b]!; i < starts[b + 1]!; i++) into[b]! += data[i]!;
  }
  return into;
}

/** Adds data[b] to every entry of sequence b. */
export function spread(starts: Int32Array, data: Float64Array, into: Float64Array): void {
  for (let b = 0; b < data.length; b++) {
    for (let i = starts[b]!; i < starts[b + 1]!; i++) into[i]! += data[b]!;
  }
}

/** The learned entries of a packed array. Throws `LOSS_SHAPE` on a wrong length. */
export function compact({ length, positions }: Selection, packed: Numbers): Float64Array {
  if (packed.length !== length) {
    throw new LockstepError(
      'LOSS_SHAPE',
      `An array of ${packed.length} numbers came with a packed batch of ${length} tokens; give one number per token.`,
      { expected: length, received: packed.length },
    );
  }
  return Float64Array.from(positions, (position) => packed[position]!);
}

/** The packed array of learned entries, 0 elsewhere. */
export function expand({ length, positions }: Selection, data: Float64Array): Float64Array {
  const packed = new Float64Array(length);
  positions.forEach((position, i) => {
    packed[position] = data[i]!;
  });
  return packed;
}
