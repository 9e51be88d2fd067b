/** Laws of batches: parts are views, all rows are there once and in order, and joining undoes cutting without a copy. */
import { describe, expect, it } from 'vitest';
import { concatRows, rowCount, Shards, sliceRows } from '../../src/cluster/rows.js';
import { evenRanges, type TokenBatch } from '../../src/data/batch.js';
import { unpackBatch } from '../unpack-batch.js';

const ascending = (length: number) => Array.from({ length }, (_, i) => i);

/** A batch with every kind of column; token t of row b is 100 b + t. */
function packed(lengths: readonly number[], more: object = {}) {
  const tokens = Int32Array.from(lengths.flatMap((length, b) => ascending(length).map((t) => 100 * b + t)));
  return {
    tokens,
    lengths: Int32Array.from(lengths),
    prompts: lengths.map((_, b) => ({ row: { id: b } })),
    scores: Float64Array.from(lengths, (_, b) => b / 2),
    columns: { logprobs: Float32Array.from(tokens, (token) => -token), mask: Uint8Array.from(tokens, (t) => t % 2) },
    name: 'rollout',
    ...more,
  };
}

const cut = <T>(batch: T, count: number) => new Shards([batch]).cut(count);

describe('evenRanges', () => {
  it('gives earlier parts one group more', () => {
    expect(evenRanges(7, 3)).toEqual([
      { begin: 0, end: 3 },
      { begin: 3, end: 5 },
      { begin: 5, end: 7 },
    ]);
    expect(evenRanges(6, 2, 2).map(({ end }) => end)).toEqual([4, 6]);
    expect(evenRanges(1, 3).map(({ begin, end }) => end - begin)).toEqual([1, 0, 0]);
  });

  it('covers all rows in order, sizes at most one group apart and never growing', () => {
    for (let groups = 0; groups <= 20; groups++) {
      for (const count of [1, 2, 3, 5, 8]) {
        for (const groupSize of [1, 2, 3]) {
          const ranges = evenRanges(groups * groupSize, count, groupSize);
          const sizes = ranges.map(({ begin, end }) => (end - begin) / groupSize);
          expect(ranges.flatMap(({ begin, end }) => ascending(end - begin).map((i) => begin + i))).toEqual(
            ascending(groups * groupSize),
          );
          expect(sizes).toEqual([...sizes].sort((a, b) => b - a));
          expect(sizes.every(Number.isInteger) && sizes[0]! - sizes.at(-1)! <= 1).toBe(true);
        }
      }
    }
  });
});

describe('cutting', () => {
  it('cuts tokens by the lengths of rows, and every column with them', () => {
    const [first, second] = cut(packed([1, 3, 2]), 2);
    expect(first).toEqual(packed([1, 3]));
    expect(second).toEqual({
      tokens: Int32Array.of(200, 201),
      lengths: Int32Array.of(2),
      prompts: [{ row: { id: 2 } }],
      scores: Float64Array.of(1),
      columns: { logprobs: Float32Array.of(-200, -201), mask: Uint8Array.of(0, 1) },
      name: 'rollout',
    });
  });

  it('makes views: parts lie in the buffers of the batch', () => {
    const batch = packed([2, 1, 4, 1]);
    cut(batch, 3).forEach((part) => {
      expect(part.tokens.buffer).toBe(batch.tokens.buffer);
      expect(part.scores.buffer).toBe(batch.scores.buffer);
      expect(part.columns.mask.buffer).toBe(batch.columns.mask.buffer);
    });
    expect(cut(batch, 3)[0]!.prompts[0]).toBe(batch.prompts[0]);
    const [whole] = cut(batch, 1);
    expect(whole).toBe(batch);
  });

  it('gives empty batches of the same kind to shards without rows', () => {
    const [, second, third] = cut(packed([5]), 3);
    expect(second).toEqual(packed([]));
    expect(third).toEqual(packed([]));
    expect(cut(packed([]), 2)).toEqual([packed([]), packed([])]);
    expect(cut([1], 2)).toEqual([[1], []]);
  });

  it('keeps rows of a group together', () => {
    const parts = cut(packed([1, 1, 2, 2, 1, 1], { groupSize: 2 }), 2);
    expect(parts.map(rowCount)).toEqual([4, 2]);
    expect(cut(packed([1, 1], { groupSize: 2 }), 2).map(rowCount)).toEqual([2, 0]);
  });

  it('cuts packed objects inside by their own lengths', () => {
    const pairs = { chosen: packed([1, 2, 3]), rejected: packed([3, 1, 1]), margins: [0, 1, 2] };
    const parts = cut(pairs, 3);
    expect(parts.map(({ chosen }) => unpackBatch(chosen).map(({ length }) => length))).toEqual([[1], [2], [3]]);
    expect(parts.map(({ rejected }) => unpackBatch(rejected).map(({ length }) => length))).toEqual([[3], [1], [1]]);
    expect(parts.map(({ margins }) => margins)).toEqual([[0], [1], [2]]);
  });

  it('counts the rows of arrays, of objects of arrays and of packed batches', () => {
    expect([[1, 2], new Float32Array(3), { name: 'x', column: [1, 2, 3, 4] }, packed([9, 9])].map(rowCount)).toEqual([
      2, 3, 4, 2,
    ]);
  });
});

describe('joining', () => {
  it('undoes cutting, in views of the same buffers', () => {
    for (const lengths of [[], [3], [1, 1, 1], [2, 1, 4, 1, 1, 3, 2]]) {
      for (const count of [1, 2, 3, 4, 9]) {
        const batch = packed(lengths);
        const joined = concatRows(cut(batch, count));
        expect(joined).toEqual(batch);
        expect(joined.tokens.buffer).toBe(batch.tokens.buffer);
        expect(joined.tokens.byteOffset).toBe(0);
        expect(joined.columns.logprobs.buffer).toBe(batch.columns.logprobs.buffer);
      }
    }
  });

  it('copies what lies apart, or in another order, into one array of that kind', () => {
    const whole = Float32Array.of(0, 1, 2, 3);
    const [low, high] = [whole.subarray(0, 2), whole.subarray(2)];
    expect(concatRows([low, high]).buffer).toBe(whole.buffer);
    const swapped = concatRows([high, low]);
    expect(swapped).toEqual(Float32Array.of(2, 3, 0, 1));
    expect(swapped.buffer).not.toBe(whole.buffer);
    const other = Float32Array.of(4, 5, 6, 7);
    expect(concatRows([low, other.subarray(2)])).toEqual(Float32Array.of(0, 1, 6, 7));
    expect(concatRows([low, new Float32Array(0), Float32Array.of(9)])).toEqual(Float32Array.of(0, 1, 9));
    expect(concatRows([whole.subarray(0, 1), high])).toEqual(Float32Array.of(0, 2, 3));
    expect(concatRows([BigInt64Array.of(1n), BigInt64Array.of(2n)])).toEqual(BigInt64Array.of(1n, 2n));
    expect(concatRows([Buffer.from('a'), Buffer.from('b')])).toEqual(Uint8Array.of(97, 98));
  });

  it('keeps a value that all parts agree on', () => {
    const parts = [
      { loss: Number.NaN, updates: 4, rows: [1] },
      { loss: Number.NaN, updates: 4, rows: [2] },
    ];
    expect(concatRows(parts)).toEqual({ loss: Number.NaN, updates: 4, rows: [1, 2] });
    expect(concatRows([undefined, undefined])).toBeUndefined();
  });
});

describe('a batch in parts', () => {
  const batch = packed([2, 1, 4, 1, 1, 3, 2]);
  const parts = [
    sliceRows(batch, { begin: 0, end: 1 }),
    sliceRows(batch, { begin: 1, end: 6 }),
    sliceRows(batch, { begin: 6, end: 7 }),
  ];

  it('is passed on as it is to as many shards', () => {
    const shards = new Shards(parts);
    expect(shards.cut(3)).toBe(parts);
  });

  it('is cut like the whole batch for any other number', () => {
    for (const count of [1, 2, 4, 5, 9]) {
      expect(new Shards(parts).cut(count)).toEqual(cut(batch, count));
      for (const part of new Shards(parts).cut(count)) expect(part.tokens.buffer).toBe(batch.tokens.buffer);
    }
  });

  it('is cut anew where a part would break a group', () => {
    const grouped = packed([1, 1, 1, 1, 1, 1], { groupSize: 2 });
    const broken = [sliceRows(grouped, { begin: 0, end: 3 }), sliceRows(grouped, { begin: 3, end: 6 })];
    expect(new Shards(broken).cut(2).map(rowCount)).toEqual([4, 2]);
  });
});

describe('refusals name the place', () => {
  const cases: [string, () => unknown, RegExp][] = [
    ['a value without rows', () => cut(3, 2), /3 has no rows; expected an array/],
    ['an object without arrays', () => cut({ temperature: 1 }, 2), /an object has no rows/],
    [
      'a column of another length',
      () => cut({ a: [1, 2], b: { c: [1] } }, 2),
      /batch\.b\.c has 1 entries; expected 2, one per row\./,
    ],
    [
      'a packed column of another length',
      () => cut(packed([2, 3], { x: [1, 2, 3] }), 2),
      /batch\.x has 3 entries; expected 2, one per row or 5/,
    ],
    [
      'packed objects of other rows',
      () => cut({ a: packed([1]), b: packed([1, 1]) }, 2),
      /batch\.b\.lengths has 2 entries; expected 1/,
    ],
    ['an empty row', () => cut(packed([2, 0]), 2), /batch\.lengths\[1\] is 0; expected an integer of at least 1/],
    ['lengths that are no array', () => rowCount({ lengths: 3 }), /batch\.lengths is 3/],
    ['an instance inside', () => cut({ a: [1, 2], seen: new Map() }, 2), /batch\.seen is an instance of Map/],
    [
      'rows that are not whole groups',
      () => cut(packed([1, 1, 1], { groupSize: 2 }), 2),
      /3 rows are not whole groups of 2/,
    ],
    ['a group of no rows', () => cut(packed([1, 1], { groupSize: 0 }), 2), /batch\.groupSize is 0/],
    [
      'values that differ',
      () => concatRows([{ loss: 1 }, { loss: 2 }]),
      /batch\.loss cannot be joined: parts hold 1 and 2/,
    ],
    [
      'kinds that differ',
      () => concatRows<unknown>([new Float32Array(1), new Float64Array(1)]),
      /a Float32Array and a Float64Array/,
    ],
    [
      'a column that a part lacks',
      () => concatRows<object>([{ a: [1], b: [1] }, { a: [1] }]),
      /batch\.b cannot be joined: parts hold an array and undefined/,
    ],
    ['no parts', () => concatRows([]), /no parts to join/],
    ['a batch in no parts', () => new Shards([]), /in no parts/],
  ];
  for (const [name, attempt, message] of cases) {
    it(name, () => {
      expect(attempt).toThrow(
        expect.objectContaining({ code: 'BATCH_INVALID', message: expect.stringMatching(message) }),
      );
    });
  }
});

it('a batch of the data room is a batch of rows', () => {
  const batch: TokenBatch = packed([2, 2]);
  expect(cut(batch, 2).map((part) => unpackBatch(part))).toEqual([[Int32Array.of(0, 1)], [Int32Array.of(100, 101)]]);
});
