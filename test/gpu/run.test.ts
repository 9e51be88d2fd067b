/** Whole runs on a GPU write the checkpoint bytes of the CPU: PPO, offloaded too, and resumed. */
import './device.js';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { createDevice } from '../../src/checkpoints/load-model.js';
import { loadNative } from '../../src/engine/native.js';
import type { Backend } from '../../src/inference/backend.js';
import { withHead } from '../../src/layout/config.js';
import { parseConfig } from '../../src/train/config.js';
import type { TrainEvent } from '../../src/train/events.js';
import { preflight } from '../../src/train/preflight.js';
import { rolesOf } from '../../src/train/roles.js';
import { train } from '../../src/train/train.js';
import { slow, testWhere } from '../conditions.js';
import { digests } from '../digests.js';
import { randomModel, sequencesOf, tinyShape, writeCheckpoint } from '../native/support.js';
import { emulated, sameAsCpu } from './device.js';

const shape = { ...tinyShape, maxPositions: 64, windows: [0, 0] };

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lockstep-gpu-run-'));
  await writeCheckpoint(randomModel('policy', shape), join(folder, 'policy'));
  await writeCheckpoint(randomModel('scorer', withHead(shape, 'score'), 2), join(folder, 'scorer'));
  const rows = sequencesOf(shape, new Array<number>(8).fill(10)).map((tokens) => ({ tokens: [...tokens] }));
  await writeFile(join(folder, 'rows.jsonl'), rows.map((row) => JSON.stringify(row)).join('\n'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const ppo = (dtype: string) => ({
  algorithm: 'ppo',
  dtype,
  model: join(folder, 'policy'),
  reward: { model: join(folder, 'scorer') },
  data: { train: join(folder, 'rows.jsonl') },
  optimizer: { learningRate: 1e-3 },
  batch: { sequences: 4, microTokens: 64 },
  rollout: { maxNewTokens: 8 },
  ppo: { miniBatches: 2 },
  checks: { mismatch: 'all' },
  memory: { device: '256MiB' },
  steps: 2,
  checkpoint: { every: 1 },
});

const twoGpus = {
  numerics: { parts: 2 },
  parallel: { tensor: 2 },
  generation: { tensor: 1, transition: 'hybridflow' },
};

let runs = 0;
async function watch(config: object, { output = join(folder, `run-${runs++}`), resume = false } = {}) {
  const events: TrainEvent[] = [];
  for await (const event of train({ ...config, output } as never, { resume })) events.push(event);
  return { events, output, checkpoints: await digests(join(output, 'checkpoints')) };
}

async function run(config: object) {
  const { events, checkpoints } = await watch(config);
  const steps = events.flatMap((event) => (event.type === 'step' ? [event.metrics] : []));
  const numbers = (name: string) => steps.map((metrics) => metrics[name] ?? 0);
  expect(Math.min(...numbers('mismatch.tokens'))).toBeGreaterThan(0);
  expect(Math.max(...numbers('mismatch.max'))).toBe(0);
  return checkpoints;
}

/** Runs with a variable of the emulation (native/cuda/emulation/cuda_runtime.h). */
async function withEmulation<T>(variable: string, value: number, work: () => Promise<T>): Promise<T> {
  const name = `LOCKSTEP_EMULATION_${variable}`;
  const before = process.env[name];
  process.env[name] = String(value);
  try {
    return await work();
  } finally {
    if (before === undefined) delete process.env[name];
    else process.env[name] = before;
  }
}

for (const [i, dtype] of (['bfloat16', 'float32'] as const).entries()) {
  (i === 0 ? test : slow)(`PPO writes the CPU's checkpoints, with mismatch 0, ${dtype}`, async () => {
    const gpu = await run({ ...ppo(dtype), device: 'cuda' });
    if (sameAsCpu(dtype)) expect(gpu).toEqual(await run({ ...ppo(dtype), device: 'cpu' }));
    for (const offload of i === 0 ? ['host', 'file'] : ['file']) {
      const memory = { device: '256MiB', offload };
      expect(await run({ ...ppo(dtype), device: 'cuda', memory })).toEqual(gpu);
    }
  });
}

test("PPO over two GPUs that generate one by one (3D-HybridEngine) writes one CPU's checkpoints", async () => {
  const cpu = { ...ppo('float32'), numerics: twoGpus.numerics, device: 'cpu' };
  expect(await run({ ...ppo('float32'), ...twoGpus, device: 'cuda' })).toEqual(await run(cpu));
});

describe('the memory plan of a run on GPUs', () => {
  const planOf = async (config: object) => {
    const parsed = parseConfig({ ...config, output: folder });
    return preflight(await rolesOf(parsed), parsed).memory;
  };
  const emulation = testWhere(emulated, 'the emulation gives a GPU as much memory as a test says');
  const withDevice = (config: { memory: object }, device: number | 'auto') => ({
    ...config,
    memory: { ...config.memory, device },
  });

  for (const [name, dtype, changes, declare] of [
    ['one GPU', 'bfloat16', {}, emulation],
    ['two GPUs that generate one by one', 'float32', twoGpus, emulation],
    ['models that take turns', 'bfloat16', { memory: { offload: 'file' } }, emulation],
    ['one GPU, without tensor cores', 'float32', {}, slow],
    ['two GPUs, each a replica', 'bfloat16', { parallel: { data: 2, zero: 2 } }, slow],
  ] as const) {
    declare(`is what it takes at most: ${name}`, async () => {
      const config = { ...ppo(dtype), memory: {}, ...changes, device: 'cuda' };
      const { lines, totalBytes } = await planOf(config);
      expect(lines.map(({ what }) => what)).toContain('CUDA queues and NCCL');
      const plenty = await run(config);
      const pages = Math.ceil(totalBytes / 4096) * 4096;
      const exact = withDevice(config, totalBytes);
      expect(await withEmulation('MEMORY', pages, () => run(exact))).toEqual(plenty);
      await withEmulation('MEMORY', totalBytes - 1, async () => {
        await expect(watch(exact)).rejects.toMatchObject({
          code: 'MEMORY_BUDGET',
          message: expect.stringMatching(
            /more than what GPU 0 has free.*CUDA queues and NCCL.*end what else uses GPU 0/s,
          ),
        });
      });
    });
  }

  emulation('leaves a tenth of what a GPU has free to the driver and NCCL where memory.device is auto', async () => {
    const config = { ...ppo('bfloat16'), memory: {}, device: 'cuda' };
    const { totalBytes } = await planOf(config);
    const needed = Math.ceil(totalBytes / 0.9);
    expect((await withEmulation('MEMORY', needed, () => planOf(config))).budgetBytes).toBe(totalBytes);
    await withEmulation('MEMORY', needed - 2, async () => {
      await expect(planOf(config)).rejects.toThrow(
        /more than 0.9 of what GPU 0 has free .*end what else uses GPU 0 .*set memory.device to more of it/s,
      );
      await planOf(withDevice(config, totalBytes));
    });
  });

  emulation('has no room that a GPU has not, whatever memory.device says', async () => {
    const config = { ...ppo('bfloat16'), memory: { device: '64MiB' }, device: 'cuda' };
    await withEmulation('MEMORY', 1 << 20, async () => {
      await expect(planOf(config)).rejects.toThrow(/more than what GPU 0 has free \(1.0 MiB\)/);
    });
    await expect(planOf({ ...config, memory: { device: '1MiB' } })).rejects.toThrow(
      /more than memory.device \(1.0 MiB\)/,
    );
  });
});

describe('pools', () => {
  const split = () => ({ ...ppo('bfloat16'), device: 'cuda', placement: 'split' });
  const gpusOf = (events: readonly TrainEvent[]) => events.flatMap((e) => (e.type === 'start' ? e.memory.gpus : []));

  testWhere(emulated, 'the emulation has as many GPUs as a test says')(
    'have GPUs of their own where there are enough, else share them, and train the same',
    async () => {
      const together = await run({ ...split(), placement: 'colocated' });
      const [one, other] = ['policy+reference', 'critic+reward'];
      for (const [gpus, places] of [
        [1, [0, 0]],
        [2, [0, 1]],
      ] as const) {
        const { events, checkpoints } = await withEmulation('DEVICES', gpus, () => watch(split()));
        expect(gpusOf(events)).toEqual([
          { pool: one, first: places[0], last: places[0], shared: gpus === 1 },
          { pool: other, first: places[1], last: places[1], shared: gpus === 1 },
        ]);
        expect(checkpoints).toEqual(together);
      }
    },
  );

  testWhere(emulated, 'the emulation has as many GPUs as a test says')(
    'take memory of their own GPUs only',
    async () => {
      const used = new Set<number>();
      await withEmulation('DEVICES', 3, async () => {
        for await (const event of train({ ...split(), steps: 1, output: join(folder, `run-${runs++}`) } as never)) {
          if (event.type !== 'step') continue;
          for (const gpu of [0, 1, 2]) {
            const { freeBytes, totalBytes } = loadNative().gpuMemory(gpu);
            if (freeBytes < totalBytes) used.add(gpu);
          }
        }
      });
      expect([...used]).toEqual([0, 1]);
    },
  );
});

testWhere(emulated, 'the emulation gives a GPU as much memory as a test says')(
  'a device that is full names what set its limit',
  async () => {
    const message = async (settings: object) => {
      await using device = createDevice({ threads: 1, processor: 'cuda', ...settings });
      try {
        device.hold({}, 2 ** 20, 'The model');
        return undefined;
      } catch (error) {
        return (error as Error).message;
      }
    };
    await withEmulation('MEMORY', 2 ** 19, async () => {
      expect(await message({})).toMatch(/0.4 MiB \(limit: 0.9 of what GPU 0 has free\).*end what else uses GPU 0/);
    });
    expect(await message({ memoryBytes: 2 ** 19 })).toMatch(/0.5 MiB \(limit: memory.device\).*; raise memory.device,/);
  },
);

test('a run tells its devices what set their limit', async () => {
  const limits: unknown[] = [];
  const backend: Backend = {
    openDevice: async ({ limit }) => {
      limits.push(limit?.what);
      throw new Error('told');
    },
  };
  for (const device of ['auto', '256MiB']) {
    const config = { ...ppo('bfloat16'), memory: { device }, device: 'cuda', output: join(folder, `run-${runs++}`) };
    await expect(train(config as never, { backend }).next()).rejects.toThrow('told');
  }
  expect(limits).toEqual(['0.9 of what GPU 0 has free', 'memory.device']);
});

test('a run that goes on where tensor cores do not add as they did says so', async () => {
  const config = { ...ppo('bfloat16'), device: 'cuda', steps: 1 };
  const { output } = await watch(config);
  const warnings = (events: readonly TrainEvent[]) => events.flatMap((e) => (e.type === 'warning' ? [e.code] : []));
  const again = (changes: object) => watch({ ...config, ...changes }, { output, resume: true });
  expect(warnings((await again({ steps: 2 })).events)).toEqual([]);
  expect(warnings((await again({ steps: 3, device: 'cpu' })).events)).toEqual(['ARCHITECTURE_DIFFERS']);
});
