/**
 * Arenas filled with the names of their elements, to run slices on: a shard's arena holds, where element (row, column) of a
 * tensor of the whole model belongs, a number made of that tensor, row and column, and zeros elsewhere.
 */
import type { PlacedShard } from '../../src/layout/placed.js';
import { type Slice, sliceBytes } from '../../src/layout/reshard-plan.js';

/** Largest primes below 2^16 and 2^32: numbers of elements are never zero. */
const modulus = { 2: 65521, 4: 4294967291 };

function hash(name: string): number {
  let h = 7;
  for (const letter of name) h = (Math.imul(h, 31) + letter.charCodeAt(0)) >>> 0;
  return h;
}

const up = (x: number, to: number) => Math.ceil(x / to) * to;

/** Byte of element (row, column) of a packed block [rows, columns], from the formulas of native/kernels/weight.h. */
function packedByte(rows: number, columns: number, row: number, column: number, elementBytes: 2 | 4): number {
  const panel = Math.floor(row / 64);
  const n = row % 64;
  const width = Math.min(64, up(rows - panel * 64, 16));
  const base = panel * 64 * up(columns, 2);
  const place =
    elementBytes === 4 ? base + column * width + n : base + Math.floor(column / 2) * 2 * width + 2 * n + (column % 2);
  return place * elementBytes;
}

/** Elements of a packed block: its last panel is as wide as its rows, up to 16. */
function packedLength(rows: number, columns: number): number {
  if (rows === 0) return 0;
  return (Math.floor((rows - 1) / 64) * 64 + up(((rows - 1) % 64) + 1, 16)) * up(columns, 2);
}

export function filledArena(shard: PlacedShard): Uint8Array {
  const arena = new Uint8Array(shard.arenaBytes);
  const view = new DataView(arena.buffer);
  for (const { tensor, offset, elementBytes } of shard.tensors) {
    const name = hash(tensor.name);
    let begin = offset;
    for (const { rows: ranges, columns } of tensor.blocks) {
      const rows = ranges.flatMap(({ begin, end }) => Array.from({ length: end - begin }, (_, i) => begin + i));
      const width = columns.end - columns.begin;
      rows.forEach((row, r) => {
        for (let c = 0; c < width; c++) {
          const number = ((name + row * 4099 + columns.begin + c) % (modulus[elementBytes] - 1)) + 1;
          const byte =
            tensor.kind === 'vector'
              ? (r * width + c) * elementBytes
              : packedByte(rows.length, width, r, c, elementBytes);
          if (elementBytes === 4) view.setUint32(begin + byte, number, true);
          else view.setUint16(begin + byte, number, true);
        }
      });
      begin += elementBytes * (tensor.kind === 'vector' ? rows.length * width : packedLength(rows.length, width));
    }
  }
  return arena;
}

/** Runs slices on arrays, and says how many runs wrote where one had written before. */
export function runSlices(slices: readonly Slice[], source: Uint8Array[], destination: Uint8Array[]): number {
  const writes = destination.map((arena) => new Uint8Array(arena.length));
  let twice = 0;
  for (const slice of slices) {
    const { count, sourceStride, destinationStride } = slice.runs ?? {
      count: 1,
      sourceStride: 0,
      destinationStride: 0,
    };
    if (sliceBytes(slice) !== slice.bytes * count || slice.bytes <= 0) throw new Error(`${slice.tensor}: bytes`);
    for (let run = 0; run < count; run++) {
      const from = slice.sourceOffset + run * sourceStride;
      const to = slice.destinationOffset + run * destinationStride;
      const data = source[slice.sourceRank]!.subarray(from, from + slice.bytes);
      if (data.length !== slice.bytes) throw new Error(`${slice.tensor}: outside rank ${slice.sourceRank}`);
      destination[slice.destinationRank]!.set(data, to);
      const marks = writes[slice.destinationRank]!.subarray(to, to + slice.bytes);
      if (marks.includes(1)) twice++;
      marks.fill(1);
    }
  }
  return twice;
}

/** Index of the first byte that differs; -1 when both are the same. */
export function firstDifference(a: Uint8Array, b: Uint8Array): number {
  if (a.length === b.length && Buffer.compare(a, b) === 0) return -1;
  const length = Math.max(a.length, b.length);
  for (let i = 0; i < length; i++) if (a[i] !== b[i]) return i;
  return -1;
}
