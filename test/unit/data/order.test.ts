import { describe, expect, test } from 'vitest';
import { microBatches, packBatch } from '../../../src/data/batch.js';
import { dataOrder, philox, shuffledRows } from '../../../src/data/sampler.js';
import { unpackBatch } from '../../unpack-batch.js';

describe('the order of the data', () => {
  const rows = (seed: number, from: number, count: number, length = 10) => {
    const order = dataOrder({ length, seed, shuffle: true });
    return Array.from({ length: count }, (_, i) => order.indexAt(from + i));
  };

  test('Philox4x32-10 gives the published vectors', () => {
    expect(philox([0, 0], [0, 0, 0, 0])).toEqual([0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    const ones = 0xffffffff;
    expect(philox([ones, ones], [ones, ones, ones, ones])).toEqual([0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    expect(philox([0xa4093822, 0x299f31d0], [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344])).toEqual([
      0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1,
    ]);
  });

  test('every pass visits every row once, and passes differ', () => {
    const all = Array.from({ length: 10 }, (_, i) => i);
    const passes = [0, 1, 2].map((pass) => rows(3, pass * 10, 10));
    for (const pass of passes) expect([...pass].sort((a, b) => a - b)).toEqual(all);
    expect(new Set(passes.map(String)).size).toBe(3);
    expect(rows(4, 0, 10)).not.toEqual(rows(3, 0, 10));
  });

  test('a position is all that is needed to resume, and positions may be asked in any order', () => {
    expect(rows(3, 7, 20)).toEqual(rows(3, 0, 27).slice(7));
    const order = dataOrder({ length: 10, seed: 3, shuffle: true });
    const backwards = Array.from({ length: 27 }, (_, i) => order.indexAt(26 - i));
    expect(backwards.reverse()).toEqual(rows(3, 0, 27));
  });

  test('without shuffling the order is that of the file', () => {
    const order = dataOrder({ length: 3, seed: 1, shuffle: false });
    expect([0, 1, 2, 3, 4].map((position) => order.indexAt(position))).toEqual([0, 1, 2, 0, 1]);
    expect([2, 3].map((position) => order.passOf(position))).toEqual([0, 1]);
    expect(() => dataOrder({ length: 0, seed: 1, shuffle: true })).toThrow(/no rows/);
  });

  test('every row is as likely in every place', () => {
    const counts = Array.from({ length: 5 }, () => new Array<number>(5).fill(0));
    const trials = 5000;
    for (let pass = 0; pass < trials; pass++) {
      for (const [at, row] of shuffledRows(5, 1, pass).entries()) counts[at]![row]!++;
    }
    const expected = trials / 5;
    const chiSquared = counts.flat().reduce((sum, count) => sum + (count - expected) ** 2 / expected, 0);
    // 16 degrees of freedom: above 39.3 once in a thousand.
    expect(chiSquared).toBeLessThan(39.3);
  });
});

describe('batches', () => {
  test('packing and unpacking are inverse', () => {
    const sequences = [[1, 2, 3], [4], [5, 6]].map((tokens) => Int32Array.from(tokens));
    const batch = packBatch(sequences);
    expect([[...batch.tokens], [...batch.lengths]]).toEqual([
      [1, 2, 3, 4, 5, 6],
      [3, 1, 2],
    ]);
    expect(unpackBatch(batch)).toEqual(sequences);
    expect(() => packBatch([Int32Array.of(1), new Int32Array(0)])).toThrow(/Sequence 1 of the batch has no tokens/);
  });

  const split = (lengths: number[], microTokens: number, group = 1) =>
    microBatches(lengths, microTokens, { group }).map(({ begin, end }) => [begin, end]);

  test('rows stay in order and fill each micro-batch as far as they fit', () => {
    expect(split([4, 4, 4, 2, 8], 8)).toEqual([
      [0, 2],
      [2, 4],
      [4, 5],
    ]);
    expect(split([], 8)).toEqual([]);
  });

  test('odd lengths count as even ones', () => {
    expect(split([3, 3], 6)).toEqual([
      [0, 1],
      [1, 2],
    ]);
    expect(split([3, 3], 8)).toEqual([[0, 2]]);
  });

  test('a longer sequence is alone', () => {
    expect(split([2, 100, 2, 2], 8)).toEqual([
      [0, 1],
      [1, 2],
      [2, 4],
    ]);
  });

  test('groups stay together', () => {
    expect(split([2, 2, 2, 2, 2, 2], 6, 2)).toEqual([
      [0, 2],
      [2, 4],
      [4, 6],
    ]);
    expect(split([6, 6, 2, 2], 8, 2)).toEqual([
      [0, 2],
      [2, 4],
    ]);
    expect(() => split([1, 2, 3], 8, 2)).toThrow(/3 rows cannot be split into groups of 2/);
  });
});
