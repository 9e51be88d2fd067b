/** Laws of routings and the registry. */
import { describe, expect, it } from 'vitest';
import { findProtocol, registerProtocol, transferProtocols } from '../../src/cluster/protocols.js';
import { type Routing, routed } from '../../src/cluster/routing.js';
import { Shards } from '../../src/cluster/rows.js';
import { generationReplicas, worldSize } from '../../src/layout/parallel.js';
import { degrees, layouts } from './counting-worker.js';

const ranks = { layout: degrees(1, 2, 2) };
const fixed = (routing: Routing) => () => routing;

describe('every layout of at most 16 ranks', () => {
  const all = layouts(16);

  it('is a layout with its generation layouts', () => {
    expect(all.length).toBeGreaterThan(100);
  });

  it('3D_PROTO and 3D_ALL_MICRO_DP: what ranks receive, joined from those that answer, is the batch', () => {
    for (const where of all) {
      for (const name of ['3D_PROTO', '3D_ALL_MICRO_DP'] as const) {
        const { distribute, collect, answers } = transferProtocols[name];
        const shards =
          name === '3D_PROTO' ? where.layout.data : generationReplicas(where.layout, where.generation).count;
        for (const rows of [0, 1, shards + 1, 2 * shards]) {
          const batch = Int32Array.from({ length: rows }, (_, row) => row);
          const parts = distribute(batch, where);
          expect(parts.length).toBe(worldSize(where.layout));
          expect(collect(parts, where)).toEqual(batch);
        }
        expect(answers(where).filter(Boolean).length).toBe(shards);
      }
    }
  });

  it('lists have one answer per rank, or per pipeline stage', () => {
    for (const where of all) {
      const world = Array.from({ length: worldSize(where.layout) }, (_, rank) => rank);
      expect(transferProtocols.ONE_TO_ALL.collect(world, where)).toEqual(world);
      expect(transferProtocols.ALL_TO_ALL.collect(world, where)).toEqual(world);
      expect(transferProtocols['3D_PP_ONLY'].collect(world, where)).toEqual(
        world.filter((rank) => rank < where.layout.pipeline * where.layout.tensor && rank % where.layout.tensor === 0),
      );
    }
  });
});

describe('routed', () => {
  it('joins in the order of shards, whatever the order of ranks', () => {
    const reversed = routed(
      'batch',
      'batch',
      fixed({ shardOfRank: [1, 1, 0, 0], answers: [false, true, true, false] }),
    );
    const parts = reversed.distribute(['a', 'b', 'c'], ranks);
    expect(parts).toEqual([['c'], ['c'], ['a', 'b'], ['a', 'b']]);
    expect(reversed.collect(parts, ranks)).toEqual(['a', 'b', 'c']);
  });

  it('gives the very value, unlooked at, when there is one shard', () => {
    const settings = new Map([['seed', 1]]);
    for (const part of transferProtocols.ONE_TO_ALL.distribute(settings, ranks)) expect(part).toBe(settings);
  });

  it('takes a batch in parts', () => {
    const shards = new Shards([[1], [2, 3, 4]]);
    expect(transferProtocols['3D_PROTO'].distribute(shards, ranks)).toEqual([[1], [1], [2, 3, 4], [2, 3, 4]]);
    expect(transferProtocols.ONE_TO_ALL.distribute(shards, ranks)[3]).toEqual([1, 2, 3, 4]);
    expect(transferProtocols.ALL_TO_ALL.distribute(new Shards([1, 2, 3, 4]), ranks)).toEqual([1, 2, 3, 4]);
  });

  const refusals: [string, 'batch' | 'list', Routing, RegExp][] = [
    ['too few ranks', 'batch', { shardOfRank: [0, 1], answers: [true, true] }, /2 shards and 2 answers; expected 4/],
    [
      'a shard of no rank',
      'batch',
      { shardOfRank: [0, 0, 2, 2], answers: [true, false, true, false] },
      /shard 1 of 3 to no rank/,
    ],
    [
      'two answers of a shard',
      'batch',
      { shardOfRank: [0, 0, 1, 1], answers: [true, true, true, false] },
      /shard 0 from ranks \[0, 1\]/,
    ],
    [
      'a shard without answer',
      'batch',
      { shardOfRank: [0, 0, 1, 1], answers: [true, false, false, false] },
      /shard 1 from ranks \[\]/,
    ],
    ['a list of too few ranks', 'list', { shardOfRank: [0], answers: [true] }, /expected 4/],
  ];
  for (const [name, gives, routing, message] of refusals) {
    it(`refuses ${name}`, () => {
      const refused = expect.objectContaining({ code: 'PROTOCOL_INVALID', message: expect.stringMatching(message) });
      expect(() => routed('batch', gives, fixed(routing)).answers(ranks)).toThrow(refused);
      expect(() => routed('batch', gives, fixed(routing)).distribute([1, 2], ranks)).toThrow(refused);
    });
  }

  it('refuses DP_PROTO over ranks that share a replica, and 3D_ALL_MICRO_DP without generation', () => {
    expect(() => transferProtocols.DP_PROTO.answers(ranks)).toThrow(/exactly one answer per shard/);
    expect(() => transferProtocols['3D_ALL_MICRO_DP'].answers(ranks)).toThrow(/no generation layout/);
  });

  it('refuses a list that does not fit', () => {
    const { distribute } = transferProtocols.ALL_TO_ALL;
    expect(() => distribute([1, 2, 3], ranks)).toThrow(/a list of 4 arguments.*received one of 3/);
    expect(() => distribute('abcd', ranks)).toThrow(/received a value of type string/);
  });
});

describe('the registry', () => {
  it('knows a pair by the name it is registered with, once', () => {
    const everySecond = routed(
      'batch',
      'list',
      fixed({ shardOfRank: [0, 0, 0, 0], answers: [true, false, true, false] }),
    );
    expect(registerProtocol('EVERY_SECOND', everySecond)).toBe(everySecond);
    expect(findProtocol('EVERY_SECOND')).toBe(everySecond);
    expect(() => registerProtocol('EVERY_SECOND', everySecond)).toThrow(
      expect.objectContaining({ code: 'PROTOCOL_EXISTS', message: expect.stringContaining('EVERY_SECOND') }),
    );
    expect(() => registerProtocol('3D_PROTO', everySecond)).toThrow(
      expect.objectContaining({ code: 'PROTOCOL_EXISTS' }),
    );
    expect(findProtocol('3D_PROTO')).toBe(transferProtocols['3D_PROTO']);
  });

  it('names what it knows when asked for something else', () => {
    expect(() => findProtocol('3D_PROT')).toThrow(
      expect.objectContaining({
        code: 'PROTOCOL_UNKNOWN',
        message: expect.stringMatching(/no transfer protocol 3D_PROT; .*3D_PROTO, /),
      }),
    );
    expect(() => findProtocol('constructor')).toThrow(/no transfer protocol constructor/);
  });
});
