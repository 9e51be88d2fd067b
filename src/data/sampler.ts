/**
 * The order in which rows are visited: pass after pass over the data, each pass shuffled anew. The order is a function of
 * (length, seed, position) only, so a position is all that a checkpoint needs to keep.
 */
import { LockstepError } from '../errors.js';

export interface DataOrder {
  /** Row visited at `position` (0, 1, 2, ... without end). */
  indexAt(position: number): number;
  /** Which pass over the data `position` belongs to. */
  passOf(position: number): number;
}

export interface DataOrderOptions {
  /** Rows of the data, at least 1. */
  length: number;
  seed: number;
  /** False: every pass in file order. */
  shuffle: boolean;
}

/** Errors: `DATA_EMPTY` for no rows. */
export function dataOrder({ length, seed, shuffle }: DataOrderOptions): DataOrder {
  if (!(length >= 1)) throw new LockstepError('DATA_EMPTY', 'The data has no rows to visit.', { length });
  let pass = -1;
  let rows: Uint32Array | undefined;
  const passOf = (position: number): number => Math.floor(position / length);
  return {
    passOf,
    indexAt: (position) => {
      if (!shuffle) return position % length;
      if (rows === undefined || passOf(position) !== pass) {
        pass = passOf(position);
        rows = shuffledRows(length, seed, pass);
      }
      return rows[position % length]!;
    },
  };
}

/** Fisher-Yates (Durstenfeld 1964) over rows 0..length-1, drawn from stream (seed, pass). */
export function shuffledRows(length: number, seed: number, pass: number): Uint32Array {
  const rows = Uint32Array.from({ length }, (_, i) => i);
  const draw = uniformIntegers(seed, pass);
  for (let i = length - 1; i > 0; i--) {
    const j = draw(i + 1);
    const row = rows[i]!;
    rows[i] = rows[j]!;
    rows[j] = row;
  }
  return rows;
}

/** Unbiased integers below a bound (at most 2^32), by rejection. */
function uniformIntegers(seed: number, pass: number): (bound: number) => number {
  const key: [number, number] = [seed >>> 0, Math.floor(seed / 2 ** 32) >>> 0];
  let block: readonly number[] = [];
  let counter = 0;
  let used = 4;
  const word = (): number => {
    if (used === 4) {
      block = philox(key, [counter >>> 0, Math.floor(counter / 2 ** 32), pass >>> 0, dataStream]);
      counter++;
      used = 0;
    }
    return block[used++]!;
  };
  return (bound) => {
    const limit = 2 ** 32 - (2 ** 32 % bound);
    let value = word();
    while (value >= limit) value = word();
    return value % bound;
  };
}

/** Keeps these draws apart from other users of the same seed. */
const dataStream = 0x64617461;

/** Philox4x32-10 (Salmon et al. 2011): four 32-bit words, a function of key and counter. */
export function philox(key: readonly [number, number], counter: readonly [number, number, number, number]): number[] {
  let [x0, x1, x2, x3] = counter as [number, number, number, number];
  let [k0, k1] = key as [number, number];
  for (let round = 0; round < 10; round++) {
    const high0 = multiplyHigh(0xd2511f53, x0);
    const low0 = Math.imul(0xd2511f53, x0) >>> 0;
    const high1 = multiplyHigh(0xcd9e8d57, x2);
    const low1 = Math.imul(0xcd9e8d57, x2) >>> 0;
    x0 = (high1 ^ x1 ^ k0) >>> 0;
    x1 = low1;
    x2 = (high0 ^ x3 ^ k1) >>> 0;
    x3 = low0;
    k0 = (k0 + 0x9e3779b9) >>> 0;
    k1 = (k1 + 0xbb67ae85) >>> 0;
  }
  return [x0, x1, x2, x3];
}

/** Upper 32 bits of the 64-bit product. */
function multiplyHigh(a: number, b: number): number {
  const a0 = a & 0xffff;
  const a1 = a >>> 16;
  const b0 = b & 0xffff;
  const b1 = b >>> 16;
  const middle = a1 * b0 + ((a0 * b0) >>> 16);
  return (a1 * b1 + Math.floor(middle / 65536) + Math.floor(((middle & 0xffff) + a0 * b1) / 65536)) >>> 0;
}
