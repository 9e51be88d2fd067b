/**
 * Runs whose models take turns on the device: the checkpoints of the run that has room for all, in the memory of the largest
 * call; a byte less is refused before anything starts.
 */
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { createDevice, createEngine } from '../../src/checkpoints/load-model.js';
import type { Device } from '../../src/engine/device.js';
import type { Dtype } from '../../src/engine/engine.js';
import type { Backend } from '../../src/inference/backend.js';
import { withHead } from '../../src/layout/config.js';
import { parseConfig } from '../../src/train/config.js';
import type { MetricsRow } from '../../src/train/events.js';
import { preflight } from '../../src/train/preflight.js';
import { rolesOf } from '../../src/train/roles.js';
import { train } from '../../src/train/train.js';
import { slow } from '../conditions.js';
import { digests } from '../digests.js';
import { randomModel, sequencesOf, smallShape, writeCheckpoint } from './support.js';

const shape = { ...smallShape, maxPositions: 256 };

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lockstep-offload-run-'));
  await writeCheckpoint(randomModel('policy', shape), join(folder, 'policy'));
  await writeCheckpoint(randomModel('scorer', withHead(shape, 'score'), 2), join(folder, 'scorer'));
  const rows = sequencesOf(shape, new Array<number>(32).fill(32)).map((tokens) => ({ tokens: [...tokens] }));
  const write = (name: string, all: readonly object[]) =>
    writeFile(join(folder, name), all.map((row) => JSON.stringify(row)).join('\n'));
  await write('rows.jsonl', rows);
  const short = sequencesOf(shape, new Array<number>(64).fill(8)).map((tokens) => ({ tokens: [...tokens] }));
  await write('short.jsonl', short);
  await write(
    'pairs.jsonl',
    short.map(({ tokens: [a, b] }) => ({ prompt: [a], chosen: [b], rejected: [a] })),
  );
});

const common = () => ({
  model: join(folder, 'policy'),
  data: { train: join(folder, 'rows.jsonl') },
  optimizer: { learningRate: 1e-3 },
  batch: { sequences: 8, microTokens: 128 },
  threads: 2,
  steps: 2,
  checkpoint: { every: 1 },
});
const configs = {
  sft: () => ({ ...common(), algorithm: 'sft' }),
  ppo: () => ({
    ...{ ...common(), algorithm: 'ppo', reward: { model: join(folder, 'scorer') } },
    ...{ rollout: { maxNewTokens: 32 }, ppo: { miniBatches: 2 }, checks: { mismatch: 'all' } },
    ...{ data: { ...common().data, eval: join(folder, 'rows.jsonl') }, evaluation: { every: 2, rows: 4 } },
  }),
};

/** As many sequences together as there can be: short pairs, and an evaluation of more rows than a step has. */
const ofManySequences = {
  dpo: () => ({ algorithm: 'dpo', data: { train: join(folder, 'pairs.jsonl') } }),
  grpo: () => ({
    ...{ algorithm: 'grpo', reward: { model: join(folder, 'scorer') }, rollout: { samples: 2, maxNewTokens: 2 } },
    ...{ data: { train: join(folder, 'short.jsonl'), eval: join(folder, 'short.jsonl') }, evaluation: { every: 1 } },
  }),
};

/** One rank whose device is seen afterwards. */
function watched(offloadFolder?: string): { backend: Backend; devices: Device[] } {
  const devices: Device[] = [];
  const backend: Backend = {
    openDevice: async ({ onWork: _, layout: __, ...settings }) => {
      const device = createDevice({ ...settings, ...(offloadFolder === undefined ? {} : { offloadFolder }) });
      devices.push(device);
      return {
        createEngine: (model, options) => createEngine({ ...options, model, device }),
        close: () => device.close(),
      };
    },
  };
  return { backend, devices };
}

let runs = 0;
async function run(config: object, changes: object = {}) {
  const output = join(folder, `run-${runs++}`);
  const { backend, devices } = watched();
  const rows: MetricsRow[] = [];
  for await (const event of train({ ...config, ...changes, output } as never, { backend })) {
    if (event.type === 'step') rows.push(event.metrics);
  }
  return { rows, output, checkpoints: await digests(join(output, 'checkpoints')), device: devices[0]! };
}

const needed = async (config: object): Promise<number> => {
  const parsed = parseConfig(config);
  return preflight(await rolesOf(parsed), parsed).memory.totalBytes;
};

/** Metrics that are functions of the weights. */
const numbers = (rows: readonly MetricsRow[]) =>
  rows.map((row) => Object.fromEntries(Object.entries(row).filter(([name]) => !/^(seconds|bytes)\./.test(name))));

const wholes = new Map<string, ReturnType<typeof run>>();
/** The run that has room for all its models. */
function whole(algorithm: keyof typeof configs, dtype: Dtype): ReturnType<typeof run> {
  const key = `${algorithm} ${dtype}`;
  const known = wholes.get(key) ?? run({ ...configs[algorithm](), dtype });
  wholes.set(key, known);
  return known;
}

describe('offloaded to the host or to files a run gives the checkpoints of the one that has room for all', () => {
  for (const [algorithm, dtype] of [
    ['sft', 'float32'],
    ['sft', 'bfloat16'],
    ['ppo', 'float32'],
    ['ppo', 'bfloat16'],
  ] as const) {
    const declare = algorithm === 'ppo' && dtype === 'float32' ? slow : test;
    declare(`${algorithm}, ${dtype}`, async () => {
      const config = { ...configs[algorithm](), dtype };
      const expected = await whole(algorithm, dtype);
      for (const [offload, beyond] of [
        ['host', 0],
        ['file', 24 << 20],
      ] as const) {
        const memory = { offload, device: (await needed({ ...config, memory: { offload } })) + beyond };
        const { checkpoints, rows, output, device } = await run(config, { memory });
        expect(checkpoints).toEqual(expected.checkpoints);
        expect(numbers(rows)).toEqual(numbers(expected.rows));
        expect((await readdir(output)).filter((name) => name.startsWith('.'))).toEqual([]);
        const { highWater } = device.spaces().device;
        expect(highWater).toBeLessThanOrEqual(memory.device);
        if (beyond === 0) expect(highWater).toBeGreaterThan(0.95 * memory.device);
      }
    });
  }
});

test('a file that cannot be written ends the run with its path; resumed, elsewhere, it is the run never stopped', async () => {
  const config = { ...configs.ppo(), dtype: 'bfloat16' };
  const device = await needed({ ...config, memory: { offload: 'file' } });
  const output = join(folder, 'failing');
  const place = await mkdtemp(join(tmpdir(), 'lockstep-offload-place-'));
  const { backend } = watched(place);
  const failing = async () => {
    for await (const event of train({ ...config, output, memory: { offload: 'file', device } } as never, { backend })) {
      if (event.type === 'checkpoint') await rm(place, { recursive: true });
    }
  };
  await expect(failing()).rejects.toMatchObject({ code: 'OFFLOAD_FILE', message: expect.stringContaining(place) });
  expect(await readdir(join(output, 'checkpoints'))).toEqual(['step-000001']);
  for await (const event of train({ ...config, output, memory: { offload: 'host', device } } as never, {
    resume: true,
  })) {
    if (event.type === 'done') expect(event.step).toBe(2);
  }
  expect(await digests(join(output, 'checkpoints'))).toEqual((await whole('ppo', 'bfloat16')).checkpoints);
});

describe('a run has enough in what its plan adds up, whatever its rows', () => {
  for (const algorithm of ['dpo', 'grpo'] as const) {
    test(algorithm, async () => {
      const config = { ...common(), batch: { sequences: 8, microTokens: 32 }, ...ofManySequences[algorithm]() };
      const { rows } = await run(config, { memory: { device: await needed(config) } });
      expect(rows).toHaveLength(2);
    });
  }
});

describe('ppo in the memory of its largest call', () => {
  test('is told in its rows: what has left, come back and been dropped', async () => {
    const config = { ...configs.ppo(), evaluation: { every: 0 } };
    const parsed = parseConfig({ ...config, memory: { offload: 'host' } });
    const device = await needed(parsed);
    const plan = preflight(await rolesOf(parsed), { ...parsed, memory: { ...parsed.memory, device } }).pools[0]!
      .rotation!;
    const { rows, device: seen } = await run(config, {
      memory: { offload: 'host', device },
      checkpoint: { every: 0 },
      steps: 3,
    });
    const total = (name: string) => rows.reduce((sum, row) => sum + row[name]!, 0);
    // In the second round everything goes round; a move under way at its end counts in the row after.
    const { offload, restore, dropped } = plan.roundBytes;
    expect(total('bytes.offload')).toBeGreaterThanOrEqual(2 * offload);
    expect(total('bytes.restore')).toBeGreaterThanOrEqual(2 * restore);
    expect(rows[1]!['bytes.dropped']).toBe(dropped);
    for (const row of rows) {
      expect(row['seconds.transfer']).toBeGreaterThan(0);
      expect(row['seconds.offload']).toBeLessThan(row['seconds.step']!);
    }
    expect(seen.spaces().host.highWater).toBeLessThanOrEqual(plan.hostBytes);
    expect(seen.spaces().host.highWater).toBeGreaterThan(0.9 * plan.hostBytes);
  });

  test('a byte less is refused before anything starts; without offload the way out is named', async () => {
    const config = { ...configs.ppo(), checkpoint: { async: false } };
    const least = await needed({ ...config, memory: { offload: 'host' } });
    const refused = async (memory: object) => {
      const parsed = parseConfig({ ...config, memory });
      const roles = await rolesOf(parsed);
      try {
        preflight(roles, parsed);
      } catch (error) {
        return error;
      }
      return undefined;
    };
    expect(await refused({ offload: 'host', device: least })).toBeUndefined();
    expect(await refused({ offload: 'host', device: least - 1 })).toMatchObject({
      code: 'MEMORY_BUDGET',
      details: { totalBytes: least, budgetBytes: least - 1 },
    });
    expect(await refused({ device: least })).toMatchObject({
      code: 'MEMORY_BUDGET',
      message: expect.stringMatching(/memory.offload: host would fit/),
    });
    expect(await refused({ device: least, host: 1000 })).toMatchObject({
      message: expect.stringMatching(/memory.offload: file would fit/),
    });
    expect(await refused({ device: least - 1 })).toMatchObject({ message: expect.not.stringContaining('offload') });
    expect(await refused({ offload: 'host', device: least, host: 1000 })).toMatchObject({
      code: 'MEMORY_BUDGET',
      message: expect.stringContaining('memory.host'),
    });
    expect(await refused({ offload: 'file', device: least, host: 1000 })).toBeUndefined();
  });
});
