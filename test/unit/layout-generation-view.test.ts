/**
 * Generation's weights in the slots of its buffer: every element of every generation shard is found where its view says, for
 * all golden layouts, all engines and models of every kind; and which tensors have to be staged.
 */
import { describe, expect, test } from 'vitest';
import { type GenerationView, generationView } from '../../src/layout/generation-view.js';
import type { TransitionEngine } from '../../src/layout/hybrid-engine.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { worldSize } from '../../src/layout/parallel.js';
import { blockOffsets, type PlacedShard, placeShard } from '../../src/layout/placed.js';
import { blockElements, shardTable } from '../../src/layout/shards.js';
import { type TransitionOptions, transitionPlan } from '../../src/layout/transition-plan.js';
import { filledArena, firstDifference, runSlices } from './layout-arenas.js';
import { gpt2, rotary, smallShapes } from './layout-shapes.js';
import { goldenLayouts, parts, type TransitionLayout, trainingMemory } from './layout-transitions.js';

const engines: TransitionEngine[] = ['ds-chat', 'hybridflow-v', 'hybridflow'];
/** Of one training replica: the others read in the same places. */
const layouts: TransitionLayout[] = [
  ...goldenLayouts(parts)
    .map((layout) => ({ ...layout, train: { ...layout.train, data: 1 } }))
    .filter(({ train }) => worldSize(train) <= 16),
  { name: '4-2-1_to_2-1', train: { pipeline: 4, tensor: 2, data: 1 }, generation: { pipeline: 2, tensor: 1 } },
  { name: '2-8-1_to_1-2', train: { pipeline: 2, tensor: 8, data: 1 }, generation: { pipeline: 1, tensor: 2 } },
  { name: '1-8-1_to_1-4', train: { pipeline: 1, tensor: 8, data: 1 }, generation: { pipeline: 1, tensor: 4 } },
];

/** Generation memories after the transition, by the plan and the staging alone. */
function memoriesOf(options: TransitionOptions): { views: GenerationView[]; memories: Uint8Array[] } {
  const { shape, train, dtype } = options;
  const plan = transitionPlan(options);
  const shards: PlacedShard[] = Array.from({ length: train.pipeline * train.tensor }, (_, rank) =>
    placeShard(shardTable(shape, parts, train, rank), dtype),
  );
  const views = plan.ranks.map((_, rank) => generationView(options, plan, rank));
  const memories = views.map(({ memoryBytes }) => new Uint8Array(memoryBytes));
  const training = trainingMemory(options, shards, shards.map(filledArena));
  plan.ranks.forEach(({ training: { slotOffset } }, rank) => {
    if (slotOffset !== undefined) memories[rank]!.set(training[rank]!, slotOffset);
  });
  runSlices(plan.slices, training, memories);
  for (const [rank, { staging }] of views.entries()) {
    const inside = staging.slices.map((slice) => ({ ...slice, sourceRank: 0 }));
    expect(runSlices(inside, [memories[rank]!], [memories[rank]!])).toBe(0);
  }
  return { views, memories };
}

/** What lies where the view says is, block by block, what a shard of its own would hold. */
function checkView(shape: ModelShape, view: GenerationView, memory: Uint8Array, dtype: 'float32' | 'bfloat16'): void {
  const shard = placeShard(shardTable(shape, parts, view.degrees, view.rank, view.stages), dtype);
  const expected = filledArena(shard);
  expect(view.places.length).toBe(shard.tensors.length);
  for (const [i, placed] of shard.tensors.entries()) {
    const { weights, elements, partOffsets } = view.places[i]!;
    const { tensor, elementBytes } = placed;
    const begins = blockOffsets(placed);
    let end = 0;
    for (const [b, block] of tensor.blocks.entries()) {
      const bytes = blockElements(tensor, block) * elementBytes;
      const at = partOffsets ? partOffsets[b]! * elementBytes : begins[b]! - placed.offset;
      const found = memory.subarray(weights + at, weights + at + bytes);
      expect(firstDifference(found, expected.subarray(begins[b]!, begins[b]! + bytes)), tensor.name).toBe(-1);
      end = Math.max(end, at + bytes);
    }
    expect(end).toBe(elements * elementBytes);
    expect(weights % 64).toBe(0);
    for (const offset of partOffsets ?? []) expect((offset * elementBytes) % 64).toBe(0);
    expect(weights + end).toBeLessThanOrEqual(memory.length);
  }
}

describe.each(layouts)('$name', ({ train, generation }) => {
  test.each(engines)('%s: views and staged tensors are the generation shard', (engine) => {
    // The engines differ in what a rank has besides its generation slots.
    for (const [, small] of engine === 'hybridflow' ? smallShapes : smallShapes.slice(2, 4)) {
      const shape = { ...small, layers: Math.max(small.layers, train.pipeline + 1) };
      const dtype = shape.tied ? 'bfloat16' : 'float32';
      const { views, memories } = memoriesOf({ shape, parts, dtype, train, generation, engine });
      for (const [rank, view] of views.entries()) checkView(shape, view, memories[rank]!, dtype);
    }
  });
});

test('uneven stages join as the training stages lie, not as generation would cut them', () => {
  const shape = rotary({ num_hidden_layers: 5 });
  const train = { pipeline: 4, tensor: 1, data: 1 };
  const options = { shape, parts, dtype: 'float32', train, generation: { pipeline: 2, tensor: 1 } } as const;
  const { views, memories } = memoriesOf({ ...options, engine: 'hybridflow' });
  expect(views[0]!.stages).toEqual([
    { begin: 0, end: 2 },
    { begin: 2, end: 5 },
  ]);
  for (const [rank, view] of views.entries()) checkView(shape, view, memories[rank]!, 'float32');
});

describe('staged is', () => {
  const staged = (shape: ModelShape, t: number, generation: number) => {
    const train = { pipeline: 1, tensor: t, data: 1 };
    const options: TransitionOptions = {
      ...{ shape, parts, dtype: 'float32', train, engine: 'hybridflow' },
      generation: { pipeline: 1, tensor: generation },
    };
    const view = generationView(options, transitionPlan(options), 0);
    const names = new Set(view.staging.tensors.map((name) => name.replace(/^layers\.\d+\./, '')));
    return { names: [...names], bytes: view.staging.bytes };
  };

  test('nothing where a matrix has no biases and every rank its own key/value heads', () => {
    expect(staged(rotary({ num_key_value_heads: 8 }), 8, 2)).toEqual({ names: [], bytes: 0 });
    expect(staged(rotary({ num_key_value_heads: 2 }), 2, 1)).toEqual({ names: [], bytes: 0 });
  });

  test('nothing where generation has the degree of training', () => {
    expect(staged(gpt2(), 4, 4).names).toEqual([]);
  });

  test('the biases of rows, which lie in several slots', () => {
    const layers = 3;
    expect(staged(gpt2(), 4, 2)).toEqual({
      names: ['qkvBias', 'upBias'],
      bytes: layers * ((3 * 48) / 2 + 192 / 2) * 4,
    });
  });

  test('qkv where a copied key/value head shares a panel with query rows that generation has without it', () => {
    const narrow = { num_key_value_heads: 2, head_dim: 6 };
    expect(staged(rotary(narrow), 8, 2).names).toEqual(['qkv']);
    expect(staged(rotary(narrow), 8, 1).names).toEqual(['qkv']);
    // Each rank of generation begins with such a head, as in training.
    expect(staged(rotary(narrow), 8, 8).names).toEqual([]);
    // Query rows fill their panels: the copy lies in the next one.
    expect(staged(rotary({ num_key_value_heads: 2, head_dim: 64 }), 8, 2).names).toEqual([]);
  });
});
