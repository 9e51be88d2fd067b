import { describe, expect, test } from 'vitest';
import {
  coordinatesOf,
  type Degrees,
  dataGroups,
  generationReplicas,
  pipelineGroups,
  rankOf,
  tensorGroups,
  worldSize,
} from '../../src/layout/parallel.js';

const layouts: Degrees[] = [1, 2, 3, 4].flatMap((pipeline) =>
  [1, 2, 3, 4, 8].flatMap((tensor) => [1, 2, 3].map((data) => ({ pipeline, tensor, data }))),
);
const named = layouts.map((d) => [`${d.pipeline}-${d.tensor}-${d.data}`, d] as const);

describe('3D coordinates', () => {
  test.each(named)('%s: a rank and its coordinates name each other; tensor runs fastest, data slowest', (_, d) => {
    let rank = 0;
    for (let data = 0; data < d.data; data++) {
      for (let pipeline = 0; pipeline < d.pipeline; pipeline++) {
        for (let tensor = 0; tensor < d.tensor; tensor++, rank++) {
          expect(coordinatesOf(rank, d)).toEqual({ pipeline, tensor, data });
          expect(rankOf({ pipeline, tensor, data }, d)).toBe(rank);
        }
      }
    }
    expect(worldSize(d)).toBe(rank);
  });

  test.each(named)('%s: groups cut the ranks along one axis, in the order of that axis', (_, d) => {
    const axes = [
      ['tensor', tensorGroups(d)],
      ['pipeline', pipelineGroups(d)],
      ['data', dataGroups(d)],
    ] as const;
    for (const [axis, groups] of axes) {
      expect(groups.flat().sort((a, b) => a - b)).toEqual(Array.from({ length: worldSize(d) }, (_, rank) => rank));
      expect(groups.map((group) => group[0])).toEqual(groups.map((group) => group[0]!).sort((a, b) => a - b));
      for (const group of groups) {
        const first = coordinatesOf(group[0]!, d);
        expect(group.map((rank) => coordinatesOf(rank, d))).toEqual(
          Array.from({ length: d[axis] }, (_, i) => ({ ...first, [axis]: i })),
        );
      }
    }
  });

  test('what does not exist is refused with its bounds', () => {
    const d = { pipeline: 2, tensor: 2, data: 1 };
    for (const rank of [-1, 4, 0.5, Number.NaN]) {
      expect(() => coordinatesOf(rank, d)).toThrow(expect.objectContaining({ code: 'RANK_INVALID' }));
    }
    expect(() => coordinatesOf(4, d)).toThrow(/ranks 0\.\.3/);
    expect(() => rankOf({ pipeline: 2, tensor: 0, data: 0 }, d)).toThrow(/pipeline 2 .* 0\.\.1/);
    for (const degree of [0, -1, 1.5, Number.NaN]) {
      expect(() => worldSize({ ...d, tensor: degree })).toThrow(expect.objectContaining({ code: 'PARALLEL_INVALID' }));
    }
    expect(() => worldSize({ ...d, tensor: 0 })).toThrow(/parallel\.tensor: 0/);
  });
});

describe('generation replicas', () => {
  test('Figure 7: training 1-2-2 generates on four replicas; Figure 8(b): 1-4-2 to 1-2-2-2', () => {
    expect(generationReplicas({ pipeline: 1, tensor: 2, data: 2 }, { pipeline: 1, tensor: 1 })).toEqual({
      replicaOfRank: [0, 1, 2, 3],
      count: 4,
    });
    expect(generationReplicas({ pipeline: 1, tensor: 4, data: 2 }, { pipeline: 1, tensor: 2 })).toEqual({
      replicaOfRank: [0, 1, 0, 1, 2, 3, 2, 3],
      count: 4,
    });
  });

  test.each(named)('%s: every replica has p_g t_g ranks of one training replica', (_, d) => {
    for (const pipeline of [1, 2, 3, 4].filter((degree) => d.pipeline % degree === 0)) {
      for (const tensor of [1, 2, 4, 8].filter((degree) => d.tensor % degree === 0)) {
        const { replicaOfRank, count } = generationReplicas(d, { pipeline, tensor });
        for (let replica = 0; replica < count; replica++) {
          const ranks = replicaOfRank.flatMap((other, rank) => (other === replica ? [rank] : []));
          expect(ranks.length).toBe(pipeline * tensor);
          expect(new Set(ranks.map((rank) => coordinatesOf(rank, d).data)).size).toBe(1);
        }
        expect(Math.max(...replicaOfRank)).toBe(count - 1);
      }
    }
  });

  test('degrees that do not divide are refused with what to use', () => {
    const train = { pipeline: 2, tensor: 4, data: 1 };
    expect(() => generationReplicas(train, { pipeline: 1, tensor: 3 })).toThrow(
      /generation\.tensor: 3 .* divisor of 4/,
    );
    expect(() => generationReplicas(train, { pipeline: 4, tensor: 1 })).toThrow(/generation\.pipeline: 4/);
    expect(() => generationReplicas(train, { pipeline: 0, tensor: 1 })).toThrow(/generation\.pipeline: 0/);
  });
});
