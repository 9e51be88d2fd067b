/**
 * State that leaves the device and comes back (DESIGN §5): the bits are those of a model that never moved, the bytes are those of
 * the budgets, and what cannot be is an error with a code.
 */
import { mkdtemp, readdir, readFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { createDevice } from '../../src/checkpoints/load-model.js';
import { packBatch } from '../../src/data/batch.js';
import type { Device } from '../../src/engine/device.js';
import { moveState, type StateGroup, type StatePlace, type StatePlaces } from '../../src/engine/model-state.js';
import type { NativeEngine } from '../../src/engine/native-engine.js';
import { ParallelEngine } from '../../src/engine/parallel-engine.js';
import { offloadChunkBytes, stateGroups } from '../../src/layout/rotation.js';
import {
  dtypes,
  randomModel,
  readAll,
  requestsOf,
  sameBits,
  sameTensors,
  sampling,
  scoreTogether,
  sequencesOf,
  smallShape,
  type TestModel,
  tinyShape,
  withEngine,
} from './support.js';
import { withDevices } from './training-support.js';

const model = randomModel('small', smallShape);
const tiny = randomModel('tiny', { ...tinyShape, tied: true });
const batch = packBatch(sequencesOf(smallShape, [40, 9, 17]));
const options = { learningRate: 1e-3, betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1 } as const;

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lockstep-offload-'));
});

async function accumulate(engine: NativeEngine): Promise<void> {
  const { logprobs } = await engine.forward(batch, { outputs: ['logprobs'], keep: true });
  await engine.backward({ logprobs: logprobs!.map((x) => x / 60) });
}

async function trainingStep(engine: NativeEngine, step: number): Promise<number> {
  await accumulate(engine);
  return (await engine.step({ ...options, step })).gradientNorm;
}

const spaces = ['weights', 'moment1', 'moment2'] as const;

async function stateOf(engine: NativeEngine): Promise<Map<string, Float32Array>> {
  const parts = await Promise.all(spaces.map((space) => readAll(engine, space)));
  return new Map(parts.flatMap((part, i) => [...part].map(([name, data]) => [`${spaces[i]} ${name}`, data])));
}

const away = (place: 'host' | 'file') => ({ parameters: place, gradients: 'dropped', optimizer: place }) as const;
const back = { parameters: 'device', gradients: 'device', optimizer: 'device' } as const;
const sum = (engine: NativeEngine, groups: readonly StateGroup[] = stateGroups): number =>
  groups.reduce((total, group) => total + engine.state.bytes[group], 0);

describe.each(dtypes)('%s', (dtype) => {
  test.each(['host', 'file'] as const)('each group to %s and back is the identity, and counted', (place) =>
    withEngine(model, { dtype, train: true, offloadFolder: folder }, async (engine, device) => {
      await trainingStep(engine, 1);
      await accumulate(engine);
      const before = await stateOf(engine);
      const gradients = await readAll(engine, 'gradients');
      const held = device.spaces().device.used;
      for (const group of stateGroups) {
        const bytes = engine.state.bytes[group];
        await engine.move({ [group]: place });
        expect(device.spaces().device.used).toBe(held - bytes);
        expect(device.spaces().host.used).toBe(place === 'host' ? bytes : 0);
        expect(device.heldBytes).toBe(sum(engine) - bytes);
        await engine.move({ [group]: 'device' });
        expect(device.spaces()).toMatchObject({ device: { used: held }, host: { used: 0 } });
        expect(engine.state.counts()[group]).toMatchObject({ offloadBytes: bytes, restoreBytes: bytes });
        expect(engine.state.counts()[group].restoreSeconds).toBeGreaterThan(0);
      }
      sameTensors(await stateOf(engine), before, 'state');
      sameTensors(await readAll(engine, 'gradients'), gradients, 'gradients');
      expect(await readdir(folder)).toEqual([]);
    }),
  );

  test.each(['host', 'file'] as const)('training between moves to %s is training that never moved', async (place) => {
    const run = (moving: boolean) =>
      withEngine(model, { dtype, train: true, offloadFolder: folder }, async (engine) => {
        const norms: number[] = [];
        for (let step = 1; step <= 3; step++) {
          norms.push(await trainingStep(engine, step));
          if (!moving) continue;
          await engine.move(away(place));
          await engine.move({ parameters: 'device' });
          await scoreTogether(engine, sequencesOf(smallShape, [30]));
          await engine.move(back);
        }
        return { norms, state: await stateOf(engine), logprobs: (await scoreTogether(engine, [batch.tokens]))[0]! };
      });
    const [still, moved] = [await run(false), await run(true)];
    expect(moved.norms).toEqual(still.norms);
    sameTensors(moved.state, still.state, 'state');
    sameBits(moved.logprobs.logprobs, still.logprobs.logprobs, 'logprobs');
  });
});

describe('gradients', () => {
  test('are dropped after a step: counted, without a byte moved, and zero when they come back', () =>
    withEngine(tiny, { dtype: 'bfloat16', train: true }, async (engine, device) => {
      await trainTiny(engine);
      const { used } = device.spaces().device;
      await engine.move({ gradients: 'dropped' });
      const bytes = engine.state.bytes.gradients;
      expect(device.spaces()).toMatchObject({ device: { used: used - bytes }, host: { used: 0, highWater: 0 } });
      await engine.move({ gradients: 'device' });
      expect(engine.state.counts().gradients).toMatchObject({ offloadBytes: 0, restoreBytes: 0, droppedBytes: bytes });
      for (const [name, data] of await readAll(engine, 'gradients')) {
        sameBits(data, new Float32Array(data.length), name);
      }
    }));

  test('that no step has used are not dropped; nothing else ever is', () =>
    withEngine(tiny, { dtype: 'float32', train: true }, async (engine) => {
      const [sequence] = sequencesOf(tinyShape, [20]);
      await engine.forward(packBatch([sequence!]), { outputs: ['logprobs'], keep: true });
      await engine.backward({ logprobs: new Float32Array(20).fill(0.1) });
      const gradients = await readAll(engine, 'gradients');
      await expect(engine.move({ gradients: 'dropped' })).rejects.toMatchObject({ code: 'GRADIENTS_LIVE' });
      await engine.move({ gradients: 'host' });
      await engine.move({ gradients: 'device' });
      sameTensors(await readAll(engine, 'gradients'), gradients, 'gradients');
      for (const group of ['parameters', 'optimizer'] as const) {
        await expect(engine.move({ [group]: 'dropped' })).rejects.toMatchObject({ code: 'STATE_MOVE_INVALID' });
      }
      await engine.step({ ...options, step: 1 });
      await engine.move({ gradients: 'dropped' });
    }));

  test('that were not finite are gone, and can be dropped', () =>
    withEngine(tiny, { dtype: 'float32', train: true }, async (engine) => {
      const [sequence] = sequencesOf(tinyShape, [20]);
      await engine.forward(packBatch([sequence!]), { outputs: ['logprobs'], keep: true });
      await engine.backward({ logprobs: new Float32Array(20).fill(Number.POSITIVE_INFINITY) });
      await expect(engine.step({ ...options, step: 1 })).rejects.toMatchObject({ code: 'GRADIENT_NOT_FINITE' });
      await engine.move({ gradients: 'dropped' });
      await engine.move({ gradients: 'device' });
      await trainTiny(engine);
    }));

  test.each([0, 1])('that replicas still reduce leave when that is done, ZeRO %i', async (zero) => {
    const run = (moving: boolean) =>
      withDevices(2, async (devices) => {
        const engine = await ParallelEngine.create({
          ...{ shape: smallShape, devices, degrees: { pipeline: 1, tensor: 1, data: 2 }, dtype: 'float32' },
          ...{ train: true, zero, bucketBytes: 1 << 16, timeoutSeconds: 20 },
        });
        for (const [name, data] of await weightsOf(model)) await engine.writeTensor(name, data);
        await engine.publish();
        // The first replica ends its backward long before the second.
        const batches = [[20], new Array(2).fill(400)].map((lengths) => packBatch(sequencesOf(smallShape, lengths)));
        const ranks = engine.ranks.map((rank, replica) => ({ rank, batch: batches[replica]! }));
        const how = { outputs: ['logprobs'], keep: true } as const;
        await Promise.all(ranks.map(({ rank, batch }) => rank.runForward(rank.planForward([batch], how))));
        const moved = (place: StatePlace) =>
          moveState(engine.states.map((state) => ({ state, places: { gradients: place } })));
        const running = ranks.map(({ rank, batch }) => {
          const logprobs = new Float32Array(batch.tokens.length).fill(-0.01);
          return rank.runBackward([{ slot: 0, logprobs }], { more: false, last: true });
        });
        if (moving) running.push(moved('host'));
        await Promise.all(running);
        await moved('device');
        const { gradientNorm } = await engine.step({ ...options, step: 1 });
        return { gradientNorm, weights: await readAll(engine, 'weights') };
      });
    const [still, away] = [await run(false), await run(true)];
    expect(away.gradientNorm).toBe(still.gradientNorm);
    sameTensors(away.weights, still.weights, 'weights');
  });
});

async function trainTiny(engine: NativeEngine): Promise<void> {
  const [sequence] = sequencesOf(tinyShape, [20]);
  await engine.forward(packBatch([sequence!]), { outputs: ['logprobs'], keep: true });
  await engine.backward({ logprobs: new Float32Array(20).fill(-0.1) });
  await engine.step({ ...options, step: 1 });
}

const weightsOf = (each: TestModel) => withEngine(each, { dtype: 'float32' }, (engine) => readAll(engine, 'weights'));

describe('calls and moves', () => {
  const [sequence] = sequencesOf(tinyShape, [20]);
  const calls: Record<string, [StateGroup, (engine: NativeEngine) => Promise<unknown>]> = {
    forward: ['parameters', (engine) => scoreTogether(engine, [sequence!])],
    backward: ['gradients', (engine) => engine.backward({ logprobs: new Float32Array(20) })],
    step: ['optimizer', (engine) => engine.step({ ...options, step: 1 })],
    generate: ['parameters', (engine) => engine.generate(requestsOf([sequence!]), sampling)],
    'reading masters': ['optimizer', (engine) => engine.readTensor('model.layers.0.mlp.up_proj.weight')],
    'reading moments': ['optimizer', (engine) => engine.readTensor('model.norm.weight', 'moment1')],
    publish: ['optimizer', (engine) => engine.publish()],
    load: ['optimizer', (engine) => engine.load([])],
    save: ['optimizer', (engine) => engine.save([])],
    'saving a copy': ['optimizer', (engine) => engine.save([], { copy: true })],
    'reducing gradients': ['gradients', (engine) => engine.reduceGradients()],
    'clearing gradients': ['gradients', (engine) => engine.clearGradients()],
  };
  test.each(Object.entries(calls))('%s without its state is refused', (_, [group, call]) =>
    withEngine(tiny, { dtype: 'bfloat16', train: true }, async (engine) => {
      await engine.move({ [group]: 'host' });
      await expect(call(engine)).rejects.toMatchObject({ code: 'STATE_NOT_ON_DEVICE' });
      // Also by the rank itself, whoever calls it.
      engine.state.places[group] = 'device';
      await expect(call(engine)).rejects.toMatchObject({ code: 'STATE_NOT_ON_DEVICE' });
    }),
  );

  test('happen in the order in which they are made, without waiting in between', () =>
    withEngine(tiny, { dtype: 'float32' }, async (engine) => {
      const expected = await scoreTogether(engine, [sequence!]);
      const running: Promise<unknown>[] = [];
      const scored: ReturnType<typeof scoreTogether>[] = [];
      for (let i = 0; i < 200; i++) {
        scored.push(scoreTogether(engine, [sequence!]));
        running.push(engine.move({ parameters: 'host' }), engine.move({ parameters: 'device' }));
      }
      for (const [result] of await Promise.all(scored)) sameBits(result!.logprobs, expected[0]!.logprobs, 'logprobs');
      await Promise.all(running);
    }));

  test('what is refused leaves the ranks together', async () => {
    await withDevices(2, async (devices) => {
      const engine = await ParallelEngine.create({
        ...{ shape: smallShape, parts: 2, devices, degrees: { pipeline: 1, tensor: 2 } },
        ...{ dtype: 'float32', train: true, timeoutSeconds: 20 },
      });
      const moved = (places: StatePlaces) => moveState(engine.states.map((state) => ({ state, places })));
      const refused = { code: 'STATE_NOT_ON_DEVICE' };
      await moved({ optimizer: 'host', gradients: 'host' });
      await expect(engine.save([])).rejects.toMatchObject(refused);
      await expect(engine.load([])).rejects.toMatchObject(refused);
      await Promise.all(engine.ranks.map((rank) => expect(rank.reduceGradients()).rejects.toMatchObject(refused)));
      await moved({ optimizer: 'device', gradients: 'device' });
      const { logprobs } = await engine.forward(batch, { outputs: ['logprobs'], keep: true });
      await engine.backward({ logprobs: logprobs!.map(() => 0.1) });
      await engine.step({ ...options, step: 1 });
    });
  });

  test('a device closed in the middle of a move ends it', async () => {
    const device = createDevice({ threads: 1 });
    const engine = await model.open({ device, dtype: 'float32', train: true });
    const moves = Array.from({ length: 20 }, (_, i) => engine.move(i % 2 ? back : { optimizer: 'host' }));
    const settled = Promise.allSettled([...moves, scoreTogether(engine, [batch.tokens])]);
    await device.close();
    for (const result of await settled) {
      if (result.status === 'rejected') {
        expect(['ABORTED', 'CLOSED', 'STATE_MOVE_INVALID', 'STATE_NOT_ON_DEVICE']).toContain(result.reason.code);
      }
    }
  });
});

describe('two models in the memory of one', () => {
  interface Pair {
    device: Device;
    first: NativeEngine;
    second: NativeEngine;
  }

  /** Both models on a device that holds one of them and `workspaceBytes`; the first one is on it. */
  async function withPair(
    models: [TestModel, TestModel],
    settings: { workspaceBytes?: number; hostBytes?: number },
    run: (pair: Pair) => Promise<void>,
  ): Promise<void> {
    const { workspaceBytes = 8 << 20, ...host } = settings;
    const sizes = await Promise.all(
      models.map((each) => withEngine(each, { dtype: 'float32', train: true }, async (engine) => sum(engine))),
    );
    const device = createDevice({ threads: 1, memoryBytes: Math.max(...sizes) + workspaceBytes, ...host });
    try {
      const second = await models[1].open({ device, dtype: 'float32', train: true });
      await second.move(away('host'));
      const first = await models[0].open({ device, dtype: 'float32', train: true });
      await run({ device, first, second });
    } finally {
      await device.close();
    }
  }
  const other = randomModel('other', { ...smallShape, layers: 2, windows: [0, 0] }, 2);
  const swap = (from: NativeEngine, to: NativeEngine) =>
    moveState([
      { state: from.state, places: away('host') },
      { state: to.state, places: back },
    ]);

  test('in turn: the device never holds more than the larger one, the host little more than what is away', () =>
    withPair([model, other], {}, async ({ device, first, second }) => {
      const larger = Math.max(sum(first), sum(second));
      const kept = sum(first, ['parameters', 'optimizer']);
      for (let turn = 0; turn < 2; turn++) {
        await swap(first, second);
        await swap(second, first);
      }
      const { highWater } = device.spaces().device;
      expect(highWater).toBe(larger);
      expect(device.spaces().host.highWater).toBeGreaterThanOrEqual(kept);
      expect(device.spaces().host.highWater).toBeLessThanOrEqual(kept + 2 * offloadChunkBytes);
      expect(device.heldBytes).toBe(sum(first));
    }));

  test('both learn as they would alone', async () => {
    const alone = await Promise.all(
      [model, other].map((each) =>
        withEngine(each, { dtype: 'float32', train: true }, async (engine) => {
          for (let step = 1; step <= 3; step++) await trainingStep(engine, step);
          return stateOf(engine);
        }),
      ),
    );
    await withPair([model, other], { workspaceBytes: 32 << 20 }, async ({ first, second }) => {
      for (let step = 1; step <= 3; step++) {
        await trainingStep(first, step);
        await swap(first, second);
        await trainingStep(second, step);
        await swap(second, first);
      }
      sameTensors(await stateOf(first), alone[0]!, 'the first');
      await swap(first, second);
      sameTensors(await stateOf(second), alone[1]!, 'the second');
    });
  });

  test('what does not fit beside the other is refused, and nothing has moved', () =>
    withPair([model, other], { workspaceBytes: 1 << 20 }, async ({ device, first, second }) => {
      await expect(second.move({ optimizer: 'device' })).rejects.toMatchObject({ code: 'MEMORY_BUDGET' });
      expect(second.state.places.optimizer).toBe('host');
      expect(device.heldBytes).toBe(sum(first));
      await swap(first, second);
    }));

  test('a workspace that has grown gives way, and activations in it are gone', () =>
    withPair([model, other], { workspaceBytes: 16 << 20 }, async ({ device, first, second }) => {
      await first.move(away('host'));
      await second.move({ parameters: 'device' });
      await scoreTogether(second, sequencesOf(smallShape, new Array(5).fill(700)));
      const grown = device.memory().workspace.planned;
      expect(grown).toBeGreaterThan(16 << 20);
      await second.move(back);
      await second.forward(batch, { outputs: ['logprobs'], keep: true });
      await swap(second, first);
      expect(device.memory().workspace.planned).toBeLessThanOrEqual(16 << 20);
      expect(device.spaces().device.used).toBeLessThanOrEqual(device.memoryBytes);
      await expect(second.backward({})).rejects.toMatchObject({ code: 'STATE_NOT_ON_DEVICE' });
      await trainingStep(first, 1);
    }));

  test('the place of the critic is taken by the reward model and given back: both are what they were', async () => {
    const critic = randomModel('critic', { ...smallShape, head: 'value' });
    const reward = randomModel('reward', { ...smallShape, head: 'score' }, 3);
    const scores = async (engine: NativeEngine) => (await engine.forward(batch, { outputs: ['values'] })).values!;
    const expected = await withEngine(reward, { dtype: 'float32', train: true }, scores);
    await withPair([critic, reward], {}, async ({ first, second }) => {
      const before = [await stateOf(first), await scores(first)] as const;
      for (let turn = 0; turn < 3; turn++) {
        await moveState([
          { state: first.state, places: away('host') },
          { state: second.state, places: { parameters: 'device' } },
        ]);
        sameBits(await scores(second), expected, 'scores of the reward model');
        await moveState([
          { state: second.state, places: { parameters: 'host' } },
          { state: first.state, places: back },
        ]);
      }
      sameTensors(await stateOf(first), before[0], 'critic');
      sameBits(await scores(first), before[1], 'values of the critic');
    });
  });
});

describe('what cannot be', () => {
  const open = { dtype: 'float32', train: true } as const;

  test('a move that fails leaves later ones under way where they go', () =>
    withEngine(model, { ...open, hostBytes: 5 << 20, offloadFolder: folder }, async (engine, device) => {
      const failing = engine.move({ optimizer: 'host' });
      const later = [...new Array(10).keys()].flatMap(() => [
        engine.move({ optimizer: 'device' }),
        engine.move({ optimizer: 'file' }),
      ]);
      later.push(engine.move({ parameters: 'file' }));
      await expect(failing).rejects.toMatchObject({ code: 'MEMORY_BUDGET' });
      expect(engine.state.places).toMatchObject({ optimizer: 'file', parameters: 'file' });
      await Promise.all(later);
      expect(engine.state.places).toMatchObject({ optimizer: 'file', parameters: 'file' });
      expect(device.heldBytes).toBe(engine.state.bytes.gradients);
      await engine.move(back);
      expect(device.heldBytes).toBe(sum(engine));
      await trainingStep(engine, 1);
    }));

  test('a host budget that is too small: the group can be fetched back, bit for bit', () =>
    withEngine(model, { ...open, hostBytes: 5 << 20 }, async (engine, device) => {
      await trainingStep(engine, 1);
      const before = await stateOf(engine);
      const failed = await engine.move({ optimizer: 'host' }).catch((error) => error);
      expect(failed).toMatchObject({ code: 'MEMORY_BUDGET', message: expect.stringContaining('memory.host') });
      expect(engine.state.places.optimizer).toBe('host');
      expect(device.spaces().host.used).toBe(4 << 20);
      expect(device.heldBytes).toBe(sum(engine) - (4 << 20));
      await expect(trainingStep(engine, 2)).rejects.toMatchObject({ code: 'STATE_NOT_ON_DEVICE' });
      await engine.move({ optimizer: 'device' });
      expect(device.spaces().host.used).toBe(0);
      sameTensors(await stateOf(engine), before, 'state');
    }));

  test('a folder that is not there is named, and nothing has moved', () =>
    withEngine(tiny, { ...open, offloadFolder: join(folder, 'nowhere') }, async (engine) => {
      const failed = await engine.move({ optimizer: 'file' }).catch((error) => error);
      expect(failed).toMatchObject({ code: 'OFFLOAD_FILE', message: expect.stringMatching(/nowhere.*No such file/) });
      expect(engine.state.places.optimizer).toBe('device');
      await trainTiny(engine);
    }));

  test('from one place away to another', () =>
    withEngine(tiny, { ...open, offloadFolder: folder }, async (engine) => {
      await engine.move({ optimizer: 'host' });
      const places: StatePlace[] = ['file', 'dropped'];
      for (const place of places) {
        await expect(engine.move({ optimizer: place })).rejects.toMatchObject({ code: 'STATE_MOVE_INVALID' });
      }
      await engine.move({ optimizer: 'device' });
      await trainTiny(engine);
    }));
});

test('pages are given back: an evicted model takes no memory', () =>
  withEngine(model, { dtype: 'float32', train: true, offloadFolder: folder }, async (engine) => {
    const anonymous = async () =>
      Number(/^Anonymous:\s+(\d+) kB/m.exec(await readFile('/proc/self/smaps_rollup', 'utf8'))![1]) * 1024;
    await trainingStep(engine, 1);
    const before = await anonymous();
    await engine.move(away('file'));
    const left = before - (await anonymous());
    expect(left).toBeGreaterThan(0.85 * sum(engine));
    await engine.move(back);
  }));
