/**
 * Checkpoints in any layout: the files are the same, byte for byte, whichever ranks saved them, and give every other layout the
 * same bits; saved behind the model's back they hold the state of the moment at which the save began.
 */
import { createHash } from 'node:crypto';
import { readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import {
  beginSavingModel,
  checkpointTensors,
  loadPlan,
  openCheckpoint,
  saveModel,
} from '../../src/checkpoints/hugging-face.js';
import { createDevice, createParallelEngine } from '../../src/checkpoints/load-model.js';
import { beginSavingOptimizerState, loadOptimizerState, saveOptimizerState } from '../../src/checkpoints/state.js';
import type { Device } from '../../src/engine/device.js';
import type { Dtype, Engine, FileTensor } from '../../src/engine/engine.js';
import { NativeEngine } from '../../src/engine/native-engine.js';
import { ParallelEngine } from '../../src/engine/parallel-engine.js';
import { parseModelConfig } from '../../src/layout/config.js';
import { snapshotBytes } from '../../src/layout/memory-plan.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { goldenDirectories } from './golden.js';
import {
  childPrelude,
  mostParts,
  random,
  readAll,
  runModule,
  sameTensors,
  temporaryDirectory,
  testDtypes,
  tinyShape,
} from './support.js';

type Layout = { pipeline: number; tensor: number; data?: number; zero?: number };
type Json = Record<string, unknown>;

const layouts: readonly Layout[] = [
  { pipeline: 2, tensor: 1 },
  { pipeline: 1, tensor: 2 },
  { pipeline: 2, tensor: 2 },
  { pipeline: 1, tensor: 1, data: 2 },
  { pipeline: 1, tensor: 1, data: 3, zero: 1 },
  { pipeline: 2, tensor: 2, data: 2, zero: 1 },
  { pipeline: 1, tensor: 1, data: 3, zero: 2 },
  { pipeline: 1, tensor: 2, data: 2, zero: 3 },
  { pipeline: 1, tensor: 4 },
];
const spaces = ['weights', 'moment1', 'moment2'] as const;

async function withDevices<T>(count: number, run: (devices: Device[]) => Promise<T>): Promise<T> {
  const devices = Array.from({ length: count }, () => createDevice({ threads: 1 }));
  try {
    return await run(devices);
  } finally {
    for (const device of devices) await device.close();
  }
}

/** A model that learns, on ranks that have not joined: loading and saving need no communication. */
const spread = (shape: ModelShape, devices: Device[], layout: Layout, dtype: Dtype, parts: number): Promise<Engine> => {
  const { zero = 0, ...degrees } = layout;
  return ParallelEngine.create({ shape, devices, degrees, zero, dtype, parts, train: true, timeoutSeconds: 5 });
};

/** Other numbers in every tensor of every space. */
async function fill(engine: Engine, seed: number): Promise<void> {
  const next = random(seed);
  for (const space of spaces) {
    for (const { name, shape } of checkpointTensors(engine)) {
      const size = shape.reduce((a, b) => a * b, 1);
      await engine.writeTensor(name, Float32Array.from({ length: size }, next), space);
    }
  }
}

interface SavedAs {
  configJson: Json;
  copy?: boolean;
}

/** Digest of every file. */
async function save(engine: Engine, directory: string, { configJson, copy = false }: SavedAs): Promise<Json> {
  const savings = [
    await beginSavingModel(engine, directory, { configJson, copy, maxShardBytes: 60_000 }),
    await beginSavingOptimizerState(engine, join(directory, 'trainer'), { copy }),
  ];
  for (const { written } of savings) await written;
  return digests(directory);
}

function digests(directory: string): Json {
  const files = readdirSync(directory, { recursive: true, withFileTypes: true }).filter((entry) => entry.isFile());
  return Object.fromEntries(
    files.map(({ parentPath, name }) => [
      name,
      createHash('sha256')
        .update(readFileSync(join(parentPath, name)))
        .digest('hex'),
    ]),
  );
}

async function load(engine: Engine, directory: string): Promise<void> {
  await engine.load(loadPlan(await openCheckpoint(directory), engine).tensors);
  await loadOptimizerState(engine, join(directory, 'trainer'));
}

const readSpaces = async (engine: Engine) =>
  Object.fromEntries(await Promise.all(spaces.map(async (space) => [space, await readAll(engine, space)] as const)));

async function sameInAllLayouts(shape: ModelShape, configJson: Json, dtype: Dtype, parts: number): Promise<number> {
  const directory = temporaryDirectory();
  const { files, state } = await withDevices(1, async ([device]) => {
    const engine = new NativeEngine({ shape, device: device!, dtype, parts, train: true });
    await fill(engine, 3);
    const saved = await save(engine, directory, { configJson });
    const { tensors } = await openCheckpoint(directory);
    for (const [name, data] of await readAll(engine, 'weights')) {
      const { file, offset, bytes } = tensors.get(name)!;
      expect(
        readFileSync(file)
          .subarray(offset, offset + bytes)
          .equals(new Uint8Array(data.buffer)),
        name,
      ).toBe(true);
    }
    return { files: saved, state: await readSpaces(engine) };
  });
  expect(Object.keys(files).length).toBeGreaterThan(3);
  const possible = layouts.filter(({ pipeline, tensor }) => pipeline <= shape.layers && tensor <= parts);
  for (const [i, layout] of possible.entries()) {
    await withDevices(layout.pipeline * layout.tensor * (layout.data ?? 1), async (devices) => {
      const engine = await spread(shape, devices, layout, dtype, parts);
      await load(engine, directory);
      for (const [space, tensors] of Object.entries(await readSpaces(engine))) {
        sameTensors(tensors, state[space]!, `${space} on p${layout.pipeline} t${layout.tensor}`);
      }
      const again = await save(engine, temporaryDirectory(), { configJson, copy: i % 2 === 0 });
      expect(again, `p${layout.pipeline} t${layout.tensor}`).toEqual(files);
    });
  }
  return possible.length;
}

const folders = goldenDirectories();

describe.each(folders)('$name', ({ directory }) => {
  testDtypes(
    folders.findIndex((folder) => folder.directory === directory),
    'is saved and loaded alike by all layouts',
    async (dtype) => {
      const { shape, config } = await openCheckpoint(directory);
      expect(await sameInAllLayouts(shape, config, dtype, mostParts(shape))).toBeGreaterThan(0);
    },
  );

  test('in bfloat16 without masters, is saved alike by all layouts', async () => {
    const checkpoint = await openCheckpoint(directory);
    const parts = mostParts(checkpoint.shape);
    const saved = (layout: Layout) =>
      withDevices(layout.pipeline * layout.tensor * (layout.data ?? 1), async (devices) => {
        const options = { model: checkpoint, dtype: 'bfloat16' as const, parts };
        const engine = await createParallelEngine({ ...options, devices, degrees: layout });
        const target = temporaryDirectory();
        await saveModel(engine, target, { configJson: checkpoint.config });
        return digests(target);
      });
    const expected = await saved({ pipeline: 1, tensor: 1 });
    for (const layout of layouts.filter(({ tensor }) => tensor <= parts)) expect(await saved(layout)).toEqual(expected);
  });
});

const base: Json = {
  model_type: 'llama',
  vocab_size: 97,
  hidden_size: 48,
  intermediate_size: 96,
  num_hidden_layers: 3,
  num_attention_heads: 8,
  num_key_value_heads: 2,
  head_dim: 6,
  max_position_embeddings: 64,
};
const configs: Record<string, Json> = {
  'four ranks to each key/value head, tied, fewer tokens than parts': {
    ...{ ...base, num_key_value_heads: 1, tie_word_embeddings: true, vocab_size: 7 },
  },
  'stored transposed, with biases and learned positions': {
    ...{ model_type: 'gpt2', vocab_size: 97, n_embd: 48, n_layer: 3, n_head: 8, n_positions: 16 },
  },
  'biases of queries, keys and values': { ...base, model_type: 'qwen2' },
  'head norms': { ...base, model_type: 'qwen3', num_key_value_heads: 4 },
};

describe.each(Object.entries(configs))('eight parts: %s', (_, config) => {
  testDtypes(Object.values(configs).indexOf(config), 'saved and loaded alike by all layouts', async (dtype) => {
    expect(await sameInAllLayouts(parseModelConfig(config, 'config.json'), config, dtype, 8)).toBe(layouts.length);
  });
});

/** All tensors of a space, `times` times over, in a file of their own. */
function manyTimes(engine: Engine, file: string, times: number): FileTensor[] {
  let offset = 0;
  const tensors = Array.from({ length: times }, () => checkpointTensors(engine)).flat();
  const placed = tensors.map(({ name, shape }): FileTensor => {
    const begin = offset;
    offset += shape.reduce((a, b) => a * b, 4);
    return { name, space: 'weights', file, offset: begin, dtype: 'F32' };
  });
  writeFileSync(file, '');
  truncateSync(file, offset);
  return placed;
}

describe('a save behind the model', () => {
  const configJson = { ...base, vocab_size: 1000, hidden_size: 256, intermediate_size: 704, head_dim: 32 };
  const shape = parseModelConfig(configJson, 'config.json');

  const withLearner = (run: (engine: NativeEngine, device: Device) => Promise<void>) =>
    withDevices(1, async ([device]) => {
      const engine = new NativeEngine({ shape, device: device!, dtype: 'bfloat16', train: true, parts: 4 });
      await fill(engine, 5);
      await run(engine, device!);
    });

  test('holds the state at its beginning, and takes the host memory that was planned', async () => {
    await withLearner(async (engine) => {
      const expected = await save(engine, temporaryDirectory(), { configJson });
      const directory = temporaryDirectory();
      // The writing thread has this to do first: the model changes before the checkpoint is written.
      const before = await engine.save(manyTimes(engine, join(directory, 'busy'), 20), { copy: true });
      const folder = join(directory, 'checkpoint');
      const model = await beginSavingModel(engine, folder, { configJson, copy: true, maxShardBytes: 60_000 });
      const state = await beginSavingOptimizerState(engine, join(folder, 'trainer'), { copy: true });
      await fill(engine, 6);
      await Promise.all([before.written, model.written, state.written]);
      expect(digests(folder)).toEqual(expected);
      expect(model.copiedBytes + state.copiedBytes).toBe(snapshotBytes(engine.table));
    });
  });

  test.each([
    ['no such file', (directory: string) => join(directory, 'missing'), /Cannot write .*missing: open: No such file/],
    ['a full disk', () => '/dev/full', /Cannot write \/dev\/full: pwrite at byte \d+: No space left on device/],
  ])('that fails says where, what and why: %s', async (_, fileOf, message) => {
    const directory = temporaryDirectory();
    await withLearner(async (engine) => {
      const tensors = manyTimes(engine, join(directory, 'whole'), 1).map((t) => ({ ...t, file: fileOf(directory) }));
      const failure = { code: 'CHECKPOINT_WRITE_FAILED', message: expect.stringMatching(message) };
      await expect(engine.save(tensors)).rejects.toMatchObject(failure);
      const { written } = await engine.save(tensors, { copy: true });
      await expect(written).rejects.toMatchObject(failure);
    });
  });

  test('ends when the device is closed', async () => {
    const directory = temporaryDirectory();
    await withLearner(async (engine, device) => {
      const { written } = await engine.save(manyTimes(engine, join(directory, 'busy'), 200), { copy: true });
      const start = performance.now();
      await device.close();
      expect(performance.now() - start).toBeLessThan(1000);
      await expect(written).rejects.toMatchObject({ code: 'CLOSED' });
      await expect(engine.save(manyTimes(engine, join(directory, 'more'), 1))).rejects.toMatchObject({
        code: 'CLOSED',
      });
    });
  });

  test('leaves the process free to end', async () => {
    const file = join(temporaryDirectory(), 'busy');
    const ended = await runModule(`${childPrelude(shape)}
      const { truncateSync, writeFileSync } = await import('node:fs');
      const { engine } = open();
      let offset = 0;
      const tensors = Array.from({ length: 200 }, () => checkpointTensors(engine)).flat().map(({ name, shape }) => {
        const begin = offset;
        offset += shape.reduce((a, b) => a * b, 4);
        return { name, space: 'weights', file: ${JSON.stringify(file)}, offset: begin, dtype: 'F32' };
      });
      writeFileSync(${JSON.stringify(file)}, '');
      truncateSync(${JSON.stringify(file)}, offset);
      await engine.save(tensors, { copy: true });
      process.exit(7);`);
    expect([ended.code, ended.signal, ended.stderr]).toEqual([7, null, '']);
  });
});

test('a model that was loaded for inference has no optimizer state to save', async () => {
  await withDevices(1, async ([device]) => {
    const engine = new NativeEngine({ shape: tinyShape, device: device!, dtype: 'float32' });
    const directory = temporaryDirectory();
    await expect(saveOptimizerState(engine, directory)).rejects.toMatchObject({ code: 'MODEL_NOT_TRAINED' });
    expect(readdirSync(directory)).toEqual([]);
  });
});
