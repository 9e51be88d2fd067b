/**
 * The transition of every golden layout of up to 16 ranks, run by the executor between arenas: byte for byte what the plan says
 * on arrays, counted by the communicators as the plan adds up, and given back afterwards.
 */
import { afterAll, describe, expect, test } from 'vitest';
import { createDevice } from '../../src/checkpoints/load-model.js';
import type { Device } from '../../src/engine/device.js';
import { loadNative, type NativeTransfer } from '../../src/engine/native.js';
import { nativeSlices, Transition, transferGroups } from '../../src/engine/transition.js';
import { generationGroups, type TransitionEngine } from '../../src/layout/hybrid-engine.js';
import { worldSize } from '../../src/layout/parallel.js';
import { type PlacedShard, placeShard } from '../../src/layout/placed.js';
import { receivedBytes, reshardPlan } from '../../src/layout/reshard-plan.js';
import { shardTable } from '../../src/layout/shards.js';
import type { TransitionOptions } from '../../src/layout/transition-plan.js';
import { filledArena, firstDifference, runSlices } from '../unit/layout-arenas.js';
import { rotary } from '../unit/layout-shapes.js';
import { goldenLayouts, parts, trainingMemory } from '../unit/layout-transitions.js';

const engines: TransitionEngine[] = ['ds-chat', 'hybridflow-v', 'hybridflow'];
const layouts = goldenLayouts(parts).filter(({ train }) => worldSize(train) <= 16);

const devices: Device[] = [];
const devicesFor = (count: number): Device[] => {
  while (devices.length < count) devices.push(createDevice({ threads: 1 }));
  return devices.slice(0, count);
};
afterAll(async () => {
  for (const device of devices) await device.close();
});

/** What every rank keeps in training, and a transition over memories that hold it. */
function filled(options: TransitionOptions): { transition: Transition; training: Uint8Array[] } {
  const { shape, train, dtype } = options;
  const transition = new Transition({ ...options, devices: devicesFor(worldSize(train)), timeoutSeconds: 20 });
  const shards: PlacedShard[] = Array.from({ length: train.pipeline * train.tensor }, (_, rank) =>
    placeShard(shardTable(shape, parts, train, rank), dtype),
  );
  const training = trainingMemory(options, shards, shards.map(filledArena));
  for (const [rank, bytes] of training.entries()) {
    const { memory, offset } = transition.trainingMemory(rank);
    memory.write(offset, bytes);
  }
  return { transition, training };
}

const sum = ({ sharded, replicated }: { sharded: number; replicated: number }): number => sharded + replicated;

describe.each(layouts)('$name', ({ train, generation }) => {
  const shape = rotary({ hidden_size: 16, num_hidden_layers: train.pipeline, tie_word_embeddings: true });

  test.each(engines)('%s: there and back', async (engine) => {
    const options: TransitionOptions = { shape, parts, dtype: 'bfloat16', train, generation, engine };
    const { transition, training } = filled(options);
    const { plan, views } = transition;
    const held = devices.map(({ heldBytes }) => heldBytes);
    try {
      const expected = views.map(({ memoryBytes }) => new Uint8Array(memoryBytes));
      plan.ranks.forEach(({ training: { slotOffset } }, rank) => {
        if (slotOffset !== undefined) expected[rank]!.set(training[rank]!, slotOffset);
      });
      runSlices(plan.slices, training, expected);
      for (const [rank, { staging }] of views.entries()) {
        const inside = staging.slices.map((slice) => ({ ...slice, sourceRank: 0 }));
        runSlices(inside, [expected[rank]!], [expected[rank]!]);
      }
      const counted = receivedBytes(plan.slices, plan.ranks.length).map(sum);
      for (let round = 0; round < 2; round++) {
        const report = await transition.enter();
        for (const [rank, bytes] of expected.entries()) {
          const found = transition.buffer(rank).read(0, bytes.length);
          expect(firstDifference(found, bytes), `rank ${rank}`).toBe(-1);
          const gathered = plan.ranks[rank]!.training.slotOffset === undefined ? 0 : training[rank]!.length;
          expect(devices[rank]!.heldBytes).toBe(held[rank]! + bytes.length - gathered);
        }
        expect(report.receivedBytes).toEqual(counted);
        expect(report.sentBytes.reduce((a, b) => a + b, 0)).toBe(counted.reduce((a, b) => a + b, 0));
        await transition.leave();
        for (const [rank, bytes] of training.entries()) {
          const { memory, offset } = transition.trainingMemory(rank);
          expect(firstDifference(memory.read(offset, bytes.length), bytes), `rank ${rank}`).toBe(-1);
        }
        expect(devices.slice(0, held.length).map(({ heldBytes }) => heldBytes)).toEqual(held.slice(0, held.length));
      }
    } finally {
      transition.close();
    }
  });

  test('hybridflow moves inside the micro-data groups of Figure 8, by one all-gather each', () => {
    const options: TransitionOptions = { shape, parts, dtype: 'bfloat16', train, generation, engine: 'hybridflow' };
    const { transition } = filled(options);
    const { microData } = generationGroups(train, generation, 'hybridflow');
    expect(transferGroups(transition.plan.slices, worldSize(train))).toEqual(microData);
    expect(transition.gathers).toBe(microData[0]!.length > 1 ? microData.length : 0);
    transition.close();
  });
});

describe('the general plan, by the same executor', () => {
  const shape = rotary({ num_key_value_heads: 2, hidden_size: 16, num_hidden_layers: 5 });
  const from = { pipeline: 2, tensor: 2, data: 1 };

  test.each([
    { pipeline: 1, tensor: 4, data: 1 },
    { pipeline: 4, tensor: 1, data: 1 },
    { pipeline: 2, tensor: 1, data: 2 },
  ])('2 x 2 to %j', async (to) => {
    const placed = (degrees: typeof from) =>
      Array.from({ length: 4 }, (_, rank) => placeShard(shardTable(shape, parts, degrees, rank), 'float32'));
    const [source, destination] = [placed(from), placed(to)];
    const plan = reshardPlan(source, destination);
    const { Memory, Transfer, World } = loadNative();
    const world = new World({ ranks: 4, timeoutSeconds: 20 });
    const ranks = [0, 1, 2, 3];
    const transfers: NativeTransfer[] = [];
    const memories = ranks.map((rank) => {
      const arena = filledArena(source[rank]!);
      const memory = new Memory({ name: 'source', bytes: arena.length, device: devices[rank]!.native });
      memory.write(0, arena);
      const target = new Memory({
        name: 'destination',
        bytes: destination[rank]!.arenaBytes,
        device: devices[rank]!.native,
      });
      const options = { ...nativeSlices(plan, ranks), source: memory, destination: target, group: { world, rank } };
      transfers.push(new Transfer(devicesFor(4)[rank]!.native, options));
      return target;
    });
    const runs = await Promise.all(transfers.map((transfer) => transfer.run(true)));
    const results = runs.map(({ value }) => value);
    for (const [rank, memory] of memories.entries()) {
      const expected = filledArena(destination[rank]!);
      expect(firstDifference(memory.read(0, expected.length), expected), `rank ${rank}`).toBe(-1);
    }
    expect(results.map((result) => result.receivedBytes)).toEqual(receivedBytes(plan, 4).map(sum));
    expect(transfers.some(({ gathers }) => gathers)).toBe(false);
  });
});

describe('what is given back', () => {
  // Many pages, and none of them huge (core/arena.cpp).
  const shape = rotary({ hidden_size: 64, head_dim: 16, intermediate_size: 512, num_hidden_layers: 4 });
  const options: TransitionOptions = {
    ...{ shape, parts, dtype: 'float32', engine: 'hybridflow' },
    ...{ train: { pipeline: 2, tensor: 2, data: 1 }, generation: { pipeline: 1, tensor: 1 } },
  };

  test('is the memory of the other slots, to the system and to the budget', async () => {
    const { transition, training } = filled(options);
    const resident = () => transition.memory().map(({ buffer }) => buffer.resident);
    const before = resident();
    for (const { memoryBytes } of transition.views) {
      expect(memoryBytes).toBeGreaterThan(1 << 20);
      expect(memoryBytes).toBeLessThan(4 << 20);
    }
    await transition.enter();
    for (const [rank, bytes] of resident().entries()) {
      expect(bytes).toBeGreaterThanOrEqual(transition.views[rank]!.memoryBytes);
    }
    await transition.leave();
    for (const [rank, bytes] of resident().entries()) {
      expect(before[rank]! - training[rank]!.length).toBeLessThan(3 * 4096);
      // Pages on the borders of the own slot stay.
      expect(bytes - before[rank]!).toBeLessThanOrEqual(2 * 4096);
    }
    transition.close();
  });

  test('a budget one byte short is refused before anything moves, and nothing stays held', async () => {
    const { transition } = filled(options);
    const total = transition.views[2]!.memoryBytes;
    transition.close();
    const budgets = [total, total, total - 1, total];
    const small = budgets.map((memoryBytes) => createDevice({ threads: 1, memoryBytes }));
    try {
      const tight = new Transition({ ...options, devices: small });
      const held = small.map(({ heldBytes }) => heldBytes);
      await expect(tight.enter()).rejects.toMatchObject({ code: 'MEMORY_BUDGET' });
      expect(small.map(({ heldBytes }) => heldBytes)).toEqual(held);
      expect(tight.entered).toBe(false);
    } finally {
      for (const device of small) await device.close();
    }
  });
});
