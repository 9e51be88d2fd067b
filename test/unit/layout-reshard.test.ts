import { describe, expect, test } from 'vitest';
import type { Dtype } from '../../src/layout/memory-plan.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { type Degrees, worldSize } from '../../src/layout/parallel.js';
import { type PlacedShard, placeShard, type Space, tensorBytes } from '../../src/layout/placed.js';
import { receivedBytes, reshardPlan, sliceBytes } from '../../src/layout/reshard-plan.js';
import { shardTable } from '../../src/layout/shards.js';
import { filledArena, firstDifference, runSlices } from './layout-arenas.js';
import { gpt2, rotary } from './layout-shapes.js';

const parts = 8;

function shardsOf(shape: ModelShape, degrees: Degrees, dtype: Dtype, space: Space = 'weights'): PlacedShard[] {
  return Array.from({ length: worldSize(degrees) }, (_, rank) =>
    placeShard(shardTable(shape, parts, degrees, rank), dtype, space),
  );
}

const emptyArenas = (shards: readonly PlacedShard[]) => shards.map(({ arenaBytes }) => new Uint8Array(arenaBytes));
const degreesOf = (name: string): Degrees => {
  const [pipeline, tensor, data] = name.split('-').map(Number) as [number, number, number];
  return { pipeline, tensor, data };
};

const shapes: [string, ModelShape][] = [
  // A key/value head that eight ranks share, in parts of 120 and 40 rows: more than a panel on one side; an odd width.
  [
    'one wide key/value head, with biases',
    rotary({ num_key_value_heads: 1, head_dim: 40, hidden_size: 13, attention_bias: true }),
  ],
  ['two key/value heads, tied, head norms', rotary({ model_type: 'qwen3', tie_word_embeddings: true })],
  ['gpt2', gpt2()],
];
const layouts = ['1-1-1', '1-2-2', '1-4-2', '1-8-1', '1-8-2', '2-1-1', '2-2-3', '2-4-2', '3-2-2', '3-4-1', '1-1-4'];

describe.each(shapes)('general plans of %s', (_, shape) => {
  describe.each<Dtype>(['float32', 'bfloat16'])('%s', (dtype) => {
    const placed = new Map(layouts.map((name) => [name, shardsOf(shape, degreesOf(name), dtype)]));
    const filled = new Map([...placed].map(([name, shards]) => [name, shards.map(filledArena)]));

    test.each(layouts)('from %s to every layout and back: every element in its place, once', (from) => {
      for (const to of layouts) {
        const there = emptyArenas(placed.get(to)!);
        const plan = reshardPlan(placed.get(from)!, placed.get(to)!);
        expect(runSlices(plan, filled.get(from)!, there)).toBe(0);
        there.forEach((arena, rank) => {
          expect(firstDifference(arena, filled.get(to)![rank]!), `${from} to ${to}, rank ${rank}`).toBe(-1);
        });
        const back = emptyArenas(placed.get(from)!);
        expect(runSlices(reshardPlan(placed.get(to)!, placed.get(from)!), there, back)).toBe(0);
        back.forEach((arena, rank) => {
          expect(firstDifference(arena, filled.get(from)![rank]!), `${to} back to ${from}, rank ${rank}`).toBe(-1);
        });
      }
    });
  });
});

describe('what a general plan moves', () => {
  const shape = rotary({ num_key_value_heads: 8 });
  const planOf = (from: string, to: string, model = shape) =>
    reshardPlan(shardsOf(model, degreesOf(from), 'float32'), shardsOf(model, degreesOf(to), 'float32'));

  test('nothing leaves a rank that keeps its shard, and each tensor is one slice', () => {
    for (const name of layouts) {
      const plan = planOf(name, name);
      expect(plan.every((slice) => slice.sourceRank === slice.destinationRank)).toBe(true);
      expect(new Set(plan.map((slice) => `${slice.destinationRank} ${slice.tensor}`)).size).toBe(plan.length);
    }
  });

  test('a wider layout takes only what the rank lacks, whole parts joined into one slice', () => {
    const narrow = shardsOf(shape, degreesOf('1-4-2'), 'float32');
    const wide = shardsOf(shape, degreesOf('1-8-1'), 'float32');
    const plan = reshardPlan(narrow, wide);
    expect(plan.every((slice) => slice.runs === undefined)).toBe(true);
    // Rank 0 holds parts 0 and 1 and needs part 0; rank 1 holds 2 and 3 and needs 1.
    const received = receivedBytes(plan, 8);
    expect(received[0]).toEqual({ sharded: 0, replicated: 0 });
    const needed = wide[1]!.tensors.map(tensorBytes).reduce((sum, { sharded }) => sum + sharded, 0);
    expect(received[1]).toEqual({ sharded: needed, replicated: 0 });
    // The way back: a rank lacks one or two of its two parts; those that lie together come as one slice.
    const back = reshardPlan(wide, narrow).filter(({ destinationRank }) => destinationRank === 3);
    expect(back.filter(({ tensor }) => tensor === 'layers.0.down').map(({ sourceRank }) => sourceRank)).toEqual([6, 7]);
    const whole = reshardPlan(narrow, shardsOf(shape, degreesOf('1-1-1'), 'float32'));
    expect(whole.filter(({ tensor }) => tensor === 'layers.2.up').map(({ sourceRank }) => sourceRank)).toEqual([
      0, 1, 2, 3,
    ]);
  });

  test('ranks with equal shards share the sending', () => {
    const plan = planOf('1-1-4', '3-1-4');
    const sources = new Set(
      plan.filter(({ destinationRank }) => destinationRank >= 4).map(({ sourceRank }) => sourceRank),
    );
    expect(sources).toEqual(new Set([0, 1, 2, 3]));
  });

  test('norms, tied embeddings on two stages and shared key/value heads are counted apart', () => {
    const one = rotary({ num_key_value_heads: 1, tie_word_embeddings: true });
    const whole = shardsOf(one, degreesOf('1-1-1'), 'float32');
    const cut = shardsOf(one, degreesOf('3-8-1'), 'float32');
    const plan = reshardPlan(whole, cut);
    const received = receivedBytes(plan, 24);
    const bytes = (name: string, rank: number) => {
      const slices = plan.filter(({ tensor, destinationRank }) => tensor === name && destinationRank === rank);
      return slices.map((slice) => [sliceBytes(slice), slice.replicatedBytes]);
    };
    expect(bytes('layers.0.norm1', 1)).toEqual([[48, 48]]);
    // Part 3: 42 rows in a panel of 48.
    expect(bytes('embed', 3)).toEqual([[48 * 12 * 4, 48 * 12 * 4]]);
    expect(bytes('embed', 19)).toEqual([[48 * 12 * 4, 48 * 12 * 4]]);
    // 6 query rows of 12 columns, then 12 rows of the shared head.
    expect(bytes('layers.1.qkv', 9)).toEqual([
      [6 * 12 * 4, 0],
      [12 * 12 * 4, 12 * 12 * 4],
    ]);
    expect(bytes('layers.1.down', 9)).toEqual([[16 * 4 * 4, 0]]);
    for (const [rank, { sharded, replicated }] of received.entries()) {
      const slices = plan.filter((slice) => slice.destinationRank === rank && slice.sourceRank !== rank);
      expect(sharded + replicated).toBe(slices.reduce((sum, slice) => sum + sliceBytes(slice), 0));
    }
  });

  test.each<[Space, Dtype]>([
    ['gradient', 'float32'],
    ['master', 'bfloat16'],
    ['moment2', 'bfloat16'],
  ])('%s of %s training moves as weights do, in float32', (space, dtype) => {
    const model = shapes[0]![1];
    const [from, to] = ['1-8-1', '2-2-1'].map((name) => shardsOf(model, degreesOf(name), dtype, space));
    const arenas = emptyArenas(to!);
    expect(runSlices(reshardPlan(from!, to!), from!.map(filledArena), arenas)).toBe(0);
    arenas.forEach((arena, rank) => {
      expect(firstDifference(arena, filledArena(to![rank]!))).toBe(-1);
    });
    expect(to![0]!.tensors.every(({ elementBytes }) => elementBytes === 4)).toBe(true);
    const names = to![0]!.tensors.map(({ tensor }) => tensor.name);
    expect(names.includes('layers.0.norm1')).toBe(space !== 'master');
  });

  test('an incomplete source and a source of another dtype are named', () => {
    const source = shardsOf(shape, degreesOf('2-1-1'), 'float32');
    const destination = shardsOf(shape, degreesOf('1-2-1'), 'float32');
    expect(() => reshardPlan(source.slice(1), destination)).toThrow(/Rank 0 needs rows 0\.\.41 of tensor "embed"/);
    expect(() => reshardPlan(source.slice(1), destination)).toThrow(
      expect.objectContaining({ code: 'RESHARD_INCOMPLETE' }),
    );
    const half = shardsOf(shape, degreesOf('1-2-1'), 'bfloat16');
    expect(() => reshardPlan(source, half)).toThrow(expect.objectContaining({ code: 'RESHARD_DTYPE' }));
    expect(() => reshardPlan(source, half)).toThrow(/"embed" has elements of 4 bytes .* and of 2/);
  });
});
