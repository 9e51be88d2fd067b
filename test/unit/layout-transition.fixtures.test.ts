/** The transition of every golden layout whose degrees a model can have, run on arrays and counted against Table 2. */
import { describe, expect, it, test } from 'vitest';
import {
  type Grouping,
  generationRegion,
  type TransitionEngine,
  trainingRegion,
  transitionCost,
} from '../../src/layout/hybrid-engine.js';
import type { Dtype } from '../../src/layout/memory-plan.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { type GenerationDegrees, worldSize } from '../../src/layout/parallel.js';
import { placeShard, tensorBytes } from '../../src/layout/placed.js';
import { shardTable } from '../../src/layout/shards.js';
import {
  type TransitionOptions,
  type TransitionPlan,
  transitionBytes,
  transitionPlan,
} from '../../src/layout/transition-plan.js';
import { filledArena, firstDifference, runSlices } from './layout-arenas.js';
import { rotary } from './layout-shapes.js';
import { goldenLayouts, parts, type TransitionLayout, trainingMemory } from './layout-transitions.js';

const engines: TransitionEngine[] = ['ds-chat', 'hybridflow-v', 'hybridflow'];
const groupings: Record<TransitionEngine, Grouping> = {
  'ds-chat': 'vanilla',
  'hybridflow-v': 'vanilla',
  hybridflow: 'hybridflow',
};
const golden = goldenLayouts(parts);

/** Uneven stages, and a key/value head that ranks share. */
const more: TransitionLayout[] = [
  { name: '4-2-1_to_2-1', train: { pipeline: 4, tensor: 2, data: 1 }, generation: { pipeline: 2, tensor: 1 } },
  { name: '2-8-1_to_1-2', train: { pipeline: 2, tensor: 8, data: 1 }, generation: { pipeline: 1, tensor: 2 } },
  { name: '2-4-2_to_2-4', train: { pipeline: 2, tensor: 4, data: 2 }, generation: { pipeline: 2, tensor: 4 } },
];

/** Cut evenly by t <= 8 and by any p that divides L: the embedding, held by two stages, is no stage's alone. */
const even = (layers: number): ModelShape =>
  rotary({ num_key_value_heads: 8, vocab_size: 320, tie_word_embeddings: true, num_hidden_layers: layers });
const uneven = rotary({ num_key_value_heads: 1, attention_bias: true, num_hidden_layers: 7 });

it('the fixtures hold layouts that a model can have', () => expect(golden.length).toBeGreaterThan(0));

/** Runs the plan and returns the generation buffers. */
function run(plan: TransitionPlan, training: readonly Uint8Array[]): Uint8Array[] {
  const buffers = plan.ranks.map(({ bufferBytes, training: { slotOffset } }, rank) => {
    const buffer = new Uint8Array(bufferBytes);
    if (slotOffset !== undefined) buffer.set(training[rank]!, slotOffset);
    return buffer;
  });
  // What a source keeps is what it kept before: a slice that wrote into a training shard would be read by another.
  const sources = plan.ranks.map(({ training: { slotOffset, arenaBytes } }, rank) =>
    slotOffset === undefined ? training[rank]! : buffers[rank]!.subarray(slotOffset, slotOffset + arenaBytes),
  );
  expect(runSlices(plan.slices, sources, buffers)).toBe(0);
  return buffers;
}

function checkTransition(options: TransitionOptions): TransitionPlan {
  const { shape, train, generation, engine, dtype } = options;
  const plan = transitionPlan(options);
  const shards = Array.from({ length: train.pipeline * train.tensor }, (_, rank) =>
    placeShard(shardTable(shape, parts, train, rank), dtype),
  );
  const arenas = shards.map(filledArena);
  const training = trainingMemory(options, shards, arenas);
  const buffers = run(plan, training);
  plan.ranks.forEach(({ slots, generationSlots, training: kept, bufferBytes }, rank) => {
    let end = 0;
    const wrong = slots.filter((slot) => {
      const expected = arenas[slot.rank % shards.length]!;
      const gap = slot.offset - end;
      end = slot.offset + expected.length;
      const found = buffers[rank]!.subarray(slot.offset, end);
      const replicaOf = (of: number) => Math.floor(of / shards.length);
      return gap !== 0 || firstDifference(found, expected) !== -1 || replicaOf(slot.rank) !== replicaOf(rank);
    });
    expect(wrong).toEqual([]);
    expect(bufferBytes).toBe(end);
    expect(kept.arenaBytes).toBe(training[rank]!.length);
    if (kept.slotOffset !== undefined) {
      // There and back: what training goes on with was never written.
      const own = buffers[rank]!.subarray(kept.slotOffset, kept.slotOffset + kept.arenaBytes);
      expect(firstDifference(own, training[rank]!)).toBe(-1);
      expect(plan.slices.some((s) => s.sourceRank === rank && s.destinationRank === rank)).toBe(false);
      expect(slots.find((slot) => slot.rank === rank)!.offset).toBe(kept.slotOffset);
    }
    // The generation slots are the generation shard: every training shard inside it, and nothing outside.
    const region = generationRegion(rank, train, generation, groupings[engine], shape.layers);
    const held = generationSlots.map((index) => trainingRegion(slots[index]!.rank, train, shape.layers));
    const covered = new Set<string>();
    for (const part of held) {
      for (let layer = part.begin; layer < part.end; layer++) covered.add(`${layer} ${part.firstSlice}`);
    }
    const wanted = new Set<string>();
    for (let layer = region.begin; layer < region.end; layer++) {
      for (let slice = region.firstSlice; slice < region.endSlice; slice++) wanted.add(`${layer} ${slice}`);
    }
    expect(covered).toEqual(wanted);
    expect(generationSlots).toEqual([...generationSlots].sort((a, b) => a - b));
    if (engine === 'hybridflow') expect(generationSlots.length).toBe(slots.length);
  });
  return plan;
}

const sumOf = (numbers: readonly number[]) => numbers.reduce((a, b) => a + b, 0);

describe.each(golden)('$name', ({ train, generation }) => {
  const shape = even(train.pipeline);
  const dtypes: Dtype[] = worldSize(train) > 16 ? ['bfloat16'] : ['float32', 'bfloat16'];
  test.each(engines)('%s: every element arrives, and the bytes are those of Table 2', (engine) => {
    for (const dtype of dtypes) {
      const options: TransitionOptions = { shape, parts, dtype, train, generation, engine };
      const bytes = transitionBytes(checkTransition(options));
      const shards = Array.from({ length: train.pipeline * train.tensor }, (_, rank) =>
        placeShard(shardTable(shape, parts, train, rank), dtype).tensors.map(tensorBytes),
      );
      const modelBytes = sumOf(shards.flat().map(({ sharded }) => sharded));
      const cost = transitionCost(engine, modelBytes, train, generation);
      const received = bytes.map(({ receive }) => receive.sharded);
      expect(sumOf(received)).toBe(cost.receiveBytes * bytes.length);
      for (const { receive, peak, redundant } of bytes) {
        expect(peak.sharded).toBe(cost.peakBytes);
        // Three data ranks cannot halve their way to equal pieces; powers of two are equal to the byte.
        if (engine === 'ds-chat' && !Number.isInteger(Math.log2(train.data))) continue;
        expect(receive.sharded).toBe(cost.receiveBytes);
        expect(redundant.sharded).toBe(cost.redundantBytes);
      }
    }
  });
});

describe.each(more)('uneven stages and shared heads, $name', ({ train, generation }) => {
  test.each(engines)('%s: every element arrives; bytes are sums of shards, shared rows apart', (engine) => {
    for (const dtype of ['float32', 'bfloat16'] satisfies Dtype[]) {
      const plan = checkTransition({ shape: uneven, parts, dtype, train, generation, engine });
      transitionBytes(plan).forEach(({ receive, peak, redundant }, rank) => {
        const { slots, training } = plan.ranks[rank]!;
        for (const kind of ['sharded', 'replicated'] as const) {
          const total = sumOf(slots.map(({ bytes }) => bytes[kind]));
          const own = slots.find((slot) => slot.rank === rank)!.bytes[kind];
          expect(peak[kind]).toBe(total);
          expect(receive[kind]).toBe(total - (engine === 'ds-chat' ? training.bytes[kind] : own));
          expect(redundant[kind]).toBe(engine === 'hybridflow' ? 0 : training.bytes[kind]);
          expect(receive.replicated).toBeGreaterThanOrEqual(0);
        }
      });
    }
  });
});

test('degrees that do not divide are refused', () => {
  const train = { pipeline: 2, tensor: 4, data: 1 };
  const refused = (generation: GenerationDegrees) => () =>
    transitionPlan({ shape: even(2), parts, dtype: 'float32', train, generation, engine: 'hybridflow' });
  expect(refused({ pipeline: 1, tensor: 8 })).toThrow(/generation\.tensor: 8 does not divide parallel\.tensor 4/);
  expect(refused({ pipeline: 3, tensor: 1 })).toThrow(expect.objectContaining({ code: 'PARALLEL_INVALID' }));
});
