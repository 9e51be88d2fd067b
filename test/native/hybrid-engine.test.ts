/**
 * The 3D-HybridEngine (HybridFlow, section 5): a model that trains in one layout and generates in another gives the texts and
 * log-probs of one rank, bit for bit, whatever the layouts and the transition; there and back is the identity; what changes or
 * fails on the way is an error on all ranks.
 */
import { afterAll, describe, expect, test } from 'vitest';
import { checkpointTensors, openCheckpoint } from '../../src/checkpoints/hugging-face.js';
import { createDevice, createEngine, createParallelEngine } from '../../src/checkpoints/load-model.js';
import { evenRanges, packBatch } from '../../src/data/batch.js';
import type { Device } from '../../src/engine/device.js';
import type { Dtype, Generated, GenerateOptions, GenerateRequest } from '../../src/engine/engine.js';
import { HybridEngine } from '../../src/engine/hybrid-engine.js';
import { NativeEngine } from '../../src/engine/native-engine.js';
import { ParallelEngine } from '../../src/engine/parallel-engine.js';
import { readShards, writeShards } from '../../src/engine/shard-access.js';
import { together } from '../../src/engine/together.js';
import { worldOf } from '../../src/engine/transition.js';
import { generationView } from '../../src/layout/generation-view.js';
import type { TransitionEngine } from '../../src/layout/hybrid-engine.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { type Degrees, type GenerationDegrees, microReplicas, worldSize } from '../../src/layout/parallel.js';
import { transitionPlan } from '../../src/layout/transition-plan.js';
import { goldenLayouts, type TransitionLayout } from '../unit/layout-transitions.js';
import { goldenDirectories, readGolden } from './golden.js';
import {
  randomModel,
  readAll,
  requestsOf,
  sameBits,
  sameGenerated,
  sameTensors,
  sampling,
  sequencesOf,
  smallShape,
  type TestModel,
  testDtypes,
  tinyShape,
} from './support.js';

const engines: TransitionEngine[] = ['ds-chat', 'hybridflow-v', 'hybridflow'];

const devices: Device[] = [];
const devicesFor = (count: number): Device[] => {
  while (devices.length < count) devices.push(createDevice({ threads: 1, gpu: devices.length }));
  return devices.slice(0, count);
};
afterAll(async () => {
  for (const device of devices) await device.close();
});

/** Training models of all ranks with the weights of one, and the engine that generates from them. */
interface Opened {
  hybrid: HybridEngine;
  /** Ranks of each training replica. */
  replicas: NativeEngine[][];
  close(): Promise<void>;
}

interface Source {
  shape: ModelShape;
  dtype: Dtype;
  parts: number;
  tensors: ReadonlyMap<string, Float32Array>;
}

async function sourceOf(one: NativeEngine): Promise<Source> {
  const tensors = new Map<string, Float32Array>();
  for (const { name } of checkpointTensors(one)) tensors.set(name, await one.readTensor(name));
  return { shape: one.shape, dtype: one.dtype, parts: one.parts, tensors };
}

async function open(
  { shape, dtype, parts, tensors }: Source,
  train: Degrees,
  generation: GenerationDegrees,
  engine: TransitionEngine,
): Promise<Opened> {
  const world = worldSize(train);
  const used = devicesFor(world);
  const hybrid = await HybridEngine.create({
    ...{ shape, parts, dtype, train, generation, engine },
    ...{ devices: used, timeoutSeconds: 20 },
  });
  const size = world / train.data;
  const replicas = Array.from({ length: train.data }, (_, data) => {
    const handle = worldOf(size, 20);
    return Array.from({ length: size }, (_, rank) => {
      const global = data * size + rank;
      const member = handle ? { rank: { degrees: { ...train, data: 1 }, rank, world: handle } } : {};
      const weights = hybrid.trainingWeights(global);
      return new NativeEngine({ shape, dtype, parts, device: used[global]!, weights, ...member });
    });
  });
  for (const ranks of replicas) {
    if (size > 1) await together(ranks.map((rank) => rank.join()));
    for (const [name, data] of tensors) await writeShards(ranks, name, data, 'weights');
    await together(ranks.map((rank) => rank.publish()));
  }
  const close = async () => {
    for (const rank of replicas.flat()) await rank.close();
    await hybrid.close();
  };
  return { hybrid, replicas, close };
}

async function sameWeights({ replicas }: Opened, { tensors }: Source, what: string): Promise<void> {
  for (const ranks of replicas) {
    for (const [name, expected] of tensors) {
      sameBits(await readShards([ranks], name, 'weights', false), expected, `${what}: ${name}`);
    }
  }
}

interface Generates {
  generate(requests: readonly GenerateRequest[], options: GenerateOptions): Promise<Generated[]>;
}

/** Prompts shared, short, and longer than a page; two ways of sampling; stop tokens; fewer requests than replicas. */
async function generateAll(engine: Generates, { vocabulary, maxPositions }: ModelShape): Promise<Generated[]> {
  const longest = Math.min(70, maxPositions - 12);
  const prompts = sequencesOf({ ...smallShape, vocabulary, maxPositions }, [3, 17, longest, 1, 30]);
  const requests = requestsOf([...prompts, prompts[2]!, prompts[1]!]);
  const sampled = { ...sampling, maxNewTokens: 10, stopTokens: [Math.floor(vocabulary / 3)] };
  return [
    ...(await engine.generate(requests, sampled)),
    ...(await engine.generate(requests.slice(1), { ...sampled, temperature: 0.7, topP: 0.9, topK: 12 })),
    ...(await engine.generate(requests.slice(0, 1), { ...sampled, temperature: 0 })),
  ];
}

function sameTexts(actual: readonly Generated[], expected: readonly Generated[], what: string): void {
  expect(actual.length).toBe(expected.length);
  for (const [i, text] of expected.entries()) sameGenerated(actual[i]!, text, `${what}: text ${i}`);
}

/** One rank's texts, and the same of every layout and engine. */
async function compareLayouts(one: NativeEngine, layouts: readonly TransitionLayout[]): Promise<number> {
  const source = await sourceOf(one);
  const expected = await generateAll(one, one.shape);
  let compared = 0;
  for (const { name, train, generation } of layouts) {
    for (const engine of engines) {
      if (engine === 'ds-chat' && train.data > 1) continue; // its ranks keep pieces, on which no model trains
      const opened = await open(source, train, generation, engine);
      const what = `${name}, ${engine}`;
      sameTexts(await generateAll(opened.hybrid, one.shape), expected, what);
      await sameWeights(opened, source, what);
      await opened.close();
      compared += 1;
    }
  }
  return compared;
}

const largestParts = ({ heads, keyValueHeads, feedForward }: ModelShape): number =>
  [8, 4, 2, 1].find(
    (parts) =>
      heads % parts === 0 && feedForward % parts === 0 && (keyValueHeads % parts === 0 || parts % keyValueHeads === 0),
  )!;

const folders = goldenDirectories().filter(({ directory }) => readGolden(directory).kind === 'lm');

describe.each(folders)('$name', ({ directory }) => {
  testDtypes(
    folders.findIndex((folder) => folder.directory === directory),
    'generates in every golden layout that it can have as one rank does',
    async (dtype) => {
      const checkpoint = await openCheckpoint(directory);
      const parts = largestParts(checkpoint.shape);
      const one = await createEngine({ model: checkpoint, device: devicesFor(1)[0]!, dtype, parts });
      const layouts = goldenLayouts(parts).filter(
        ({ train }) => worldSize(train) <= 8 && train.pipeline <= checkpoint.shape.layers,
      );
      expect(await compareLayouts(one, layouts)).toBeGreaterThan(0);
      await one.close();
    },
  );
});

test('which models stage what in which golden layouts: all the rest are views', async () => {
  const staging: Record<string, string[]> = {};
  for (const { name, directory } of folders) {
    const { shape } = await openCheckpoint(directory);
    const parts = largestParts(shape);
    for (const { name: layout, train, generation } of goldenLayouts(parts)) {
      if (train.pipeline > shape.layers || worldSize(train) > 16) continue;
      const options = { shape, parts, dtype: 'float32', train, generation, engine: 'hybridflow' } as const;
      const plan = transitionPlan(options);
      const staged = plan.ranks.flatMap((_, rank) => generationView(options, plan, rank).staging.tensors);
      const kinds = [...new Set(staged.map((tensor) => tensor.replace(/^layers\.\d+\./, '')))].sort().join(', ');
      if (kinds !== '') staging[layout] = [...(staging[layout] ?? []), `${name}: ${kinds}`];
    }
  }
  // Where fewer key/value heads than ranks are copied, and panels are shared with them; and biases of rows.
  const oneHead = ['llama-odd: qkv', 'qwen2: qkv, qkvBias'];
  const twoHeads = ['llama', 'llama-bf16', 'llama31', 'mistral', 'qwen3'].map((name) => `${name}: qkv`);
  const sorted = Object.fromEntries(Object.entries(staging).map(([layout, names]) => [layout, names.sort()]));
  expect(sorted).toEqual({
    '1-2-2_to_1-1-2-2': oneHead,
    '2-2-1_to_1-1-4-1': oneHead,
    '1-4-2_to_1-2-2-2': [...oneHead, ...twoHeads].sort(),
    '2-4-2_to_1-2-4-2': [...oneHead, ...twoHeads].sort(),
  });
});

const shapes: Record<string, ModelShape> = {
  'key/value heads on two ranks each, panels cut': smallShape,
  'one key/value head, tied, a vocabulary that leaves a rank nothing': {
    ...{ ...tinyShape, heads: 8, headWidth: 8, keyValueHeads: 1, feedForward: 128, tied: true, vocabulary: 20 },
  },
  'biases and learned positions': {
    ...{ ...tinyShape, family: 'gpt2', heads: 8, keyValueHeads: 8, headWidth: 8, feedForward: 256, tied: true },
    ...{ norm: 'layer', activation: 'gelu-tanh', qkvBias: true, outputBias: true, mlpBias: true },
    ...{ positions: { type: 'learned' }, maxPositions: 128, layers: 3, windows: [0, 0, 0] },
  },
};
const models: TestModel[] = Object.entries(shapes).map(([name, shape]) => randomModel(name, shape));
const layoutOf = (name: string): TransitionLayout => {
  const [p, t, d, pg, tg] = name.split(/[-_>]/).map(Number) as [number, number, number, number, number];
  return { name, train: { pipeline: p, tensor: t, data: d }, generation: { pipeline: pg, tensor: tg } };
};

describe.each(models)('eight parts: $name', (model) => {
  testDtypes(models.indexOf(model), 'every transition', async (dtype) => {
    const one = await model.open({ device: devicesFor(1)[0]!, dtype, parts: 8 });
    const deep = Math.min(3, model.shape.layers);
    const names = ['1-8-1_1-2', '1-8-1_1-4', '2-4-1_1-2', '2-2-2_2-1', `${deep}-2-1_1-1`, '1-2-2_1-1'];
    await compareLayouts(one, names.map(layoutOf));
    await one.close();
  });
});

/** A model over two stages of two ranks that generates on four. */
const quick = randomModel('small', { ...smallShape, maxPositions: 400 });
const requests = requestsOf(sequencesOf(quick.shape, [40, 3, 70, 12, 9, 30]));
const long = { ...sampling, maxNewTokens: 300 };

async function withQuick(run: (engine: ParallelEngine, one: NativeEngine) => Promise<void>): Promise<void> {
  const one = await quick.open({ device: createDevice({ threads: 1 }), dtype: 'float32', parts: 8 });
  const used = Array.from({ length: 4 }, (_, gpu) => createDevice({ threads: 1, gpu }));
  const engine = await ParallelEngine.create({
    ...{ shape: one.shape, dtype: one.dtype, parts: 8, devices: used, timeoutSeconds: 20 },
    ...{ degrees: { pipeline: 2, tensor: 2 }, generation: { pipeline: 1, tensor: 1 } },
  });
  try {
    for (const { name } of checkpointTensors(one)) await engine.writeTensor(name, await one.readTensor(name));
    await engine.publish();
    await run(engine, one);
  } finally {
    await engine.close();
    for (const device of used) await device.close();
  }
}

describe('a parallel engine with a generation layout', () => {
  test('reads a checkpoint, scores in one layout and generates in the other', async () => {
    const { directory } = folders.find(({ name }) => name === 'llama')!;
    const options = { model: directory, dtype: 'float32', parts: 2 } as const;
    const one = await createEngine({ ...options, device: devicesFor(1)[0]! });
    const engine = await createParallelEngine({
      ...{ ...options, devices: devicesFor(2), degrees: { pipeline: 1, tensor: 2 } },
      ...{ generation: { pipeline: 1, tensor: 1 }, transition: 'hybridflow-v' },
    });
    const batch = packBatch(sequencesOf(one.shape, [20, 3]));
    const score = async (of: NativeEngine | ParallelEngine) =>
      (await of.forward(batch, { outputs: ['logprobs'] })).logprobs!;
    const expected = await score(one);
    sameBits(await score(engine), expected, 'before');
    sameTexts(await generateAll(engine, one.shape), await generateAll(one, one.shape), 'texts');
    sameBits(await score(engine), expected, 'after');
    sameTensors(await readAll(engine, 'weights'), await readAll(one, 'weights'), 'weights');
    await engine.close();
    await one.close();
  });

  test('stays in its layout between enter and leave; calls of several at once take turns', async () => {
    await withQuick(async (engine, one) => {
      const few = { ...sampling, maxNewTokens: 4 };
      const expected = await one.generate(requests, few);
      const { hybrid } = engine;
      await hybrid!.enter();
      const { lastTransition } = hybrid!;
      sameTexts(await engine.generate(requests, few), expected, 'inside');
      expect(hybrid!.lastTransition).toBe(lastTransition);
      expect(hybrid!.transition.entered).toBe(true);
      await hybrid!.leave();
      const both = await Promise.all([engine.generate(requests, few), engine.generate(requests.slice(0, 2), few)]);
      sameTexts(both[0], expected, 'first');
      sameTexts(both[1], expected.slice(0, 2), 'second');
      expect(hybrid!.transition.entered).toBe(false);
    });
  });

  test('ends the requests that the callback ends, on whichever replica they are', async () => {
    await withQuick(async (engine, one) => {
      const expected = await one.generate(requests, long);
      const seen = new Set<number>();
      let total = 0;
      const actual = await engine.generate(requests, {
        ...long,
        onProgress: (progress) => {
          for (const request of progress.requests) seen.add(request);
          total = Math.max(total, progress.total);
          return [1, 5];
        },
      });
      expect([...seen].sort()).toEqual([0, 1, 2, 3, 4, 5]);
      expect(total).toBe(actual.reduce((sum, { tokens }) => sum + tokens.length, 0));
      for (const [i, text] of actual.entries()) {
        if (i !== 1 && i !== 5) {
          sameGenerated(text, expected[i]!, `text ${i}`);
          continue;
        }
        expect(text.finish).toBe('aborted');
        expect(text.tokens.length).toBeLessThan(300);
        sameBits(text.tokens, expected[i]!.tokens.subarray(0, text.tokens.length), 'what there was at its end');
      }
    });
  });

  test('an abort and a callback that throws end all replicas; the engine goes on, in its training layout', async () => {
    await withQuick(async (engine, one) => {
      const controller = new AbortController();
      const onProgress = () => void controller.abort();
      const aborted = engine.generate(requests, { ...long, onProgress, signal: controller.signal });
      await expect(aborted).rejects.toMatchObject({ name: 'AbortError' });
      let most = 0;
      const throwing: GenerateOptions['onProgress'] = ({ requests: reported, total }) => {
        most = total;
        if (reported.includes(0)) throw new Error('no more');
        return undefined;
      };
      await expect(engine.generate(requests, { ...long, onProgress: throwing })).rejects.toThrow('no more');
      expect(most).toBeLessThan((requests.length * long.maxNewTokens) / 2);
      expect(engine.hybrid!.transition.entered).toBe(false);
      const outside = [...requests, { id: 9, prompt: Int32Array.of(1000) }];
      await expect(engine.generate(outside, long)).rejects.toMatchObject({
        code: 'TOKEN_OUT_OF_RANGE',
        message: expect.stringContaining('prompt 6'),
      });
      const few = { ...sampling, maxNewTokens: 5 };
      sameTexts(await engine.generate(requests, few), await one.generate(requests, few), 'afterwards');
    });
  });

  test('a weight that changes in between is found on the way back', async () => {
    await withQuick(async (engine) => {
      const { hybrid } = engine;
      const name = 'model.layers.2.mlp.up_proj.weight';
      const data = await engine.readTensor(name);
      await hybrid!.enter();
      data[data.length - 1]! += 1;
      await engine.writeTensor(name, data);
      await expect(hybrid!.leave()).rejects.toMatchObject({
        code: 'WEIGHTS_CHANGED',
        message: expect.stringMatching(/^rank 3: tensor 'layers\.2\.up' changed .*checksum [0-9a-f]{16}, received/),
      });
      expect(hybrid!.transition.entered).toBe(false);
      await hybrid!.enter();
      await hybrid!.leave();
    });
  });

  test('activations and gathered weights use one memory in turn', async () => {
    const { shape } = quick;
    const setup = { shape, dtype: 'float32', parts: 8, degrees: { pipeline: 2, tensor: 2 } } as const;
    const budget = 24 << 20;
    const used = Array.from({ length: 4 }, (_, gpu) => createDevice({ threads: 1, gpu, memoryBytes: budget }));
    const engine = await ParallelEngine.create({ ...setup, devices: used, generation: { pipeline: 1, tensor: 1 } });
    try {
      // The longest batch that still fits beside the training shards.
      let rows = 400;
      const batch = () => packBatch(sequencesOf(shape, new Array<number>(rows / 400).fill(400)));
      const workspaces = () => used.map((device) => device.memory().workspace.planned);
      const fits = () => {
        try {
          for (const rank of engine.ranks) rank.planForward([batch()], { outputs: ['logprobs'] });
          return true;
        } catch {
          return false;
        }
      };
      while (fits()) rows += 400;
      rows -= 400;
      expect(rows).toBeGreaterThan(0);
      const score = () => engine.forward(batch(), { outputs: ['logprobs'] });
      const expected = (await score()).logprobs!;
      const full = workspaces();
      await engine.hybrid!.enter();
      expect(Math.max(...full.map((bytes, rank) => bytes + used[rank]!.heldBytes))).toBeGreaterThan(budget);
      for (const [rank, bytes] of workspaces().entries()) {
        expect(bytes + used[rank]!.heldBytes).toBeLessThanOrEqual(budget);
      }
      await expect(score()).rejects.toMatchObject({ code: 'MEMORY_BUDGET' });
      expect(await engine.generate(requests, { ...sampling, maxNewTokens: 2 })).toHaveLength(requests.length);
      await engine.hybrid!.leave();
      sameBits((await score()).logprobs!, expected, 'afterwards');
      expect(workspaces()).toEqual(full);
    } finally {
      await engine.close();
      expect(used.map(({ heldBytes }) => heldBytes)).toEqual([0, 0, 0, 0]);
      for (const device of used) await device.close();
    }
  });

  test('a device that is closed in the middle ends the call on all replicas', async () => {
    for (const bad of [0, 3]) {
      await withQuick(async (engine) => {
        const used = (engine.ranks as unknown as { device: Device }[]).map(({ device }) => device);
        const running = engine.generate(requests, { ...long, onProgress: () => void used[bad]!.close() });
        await expect(running).rejects.toMatchObject({ code: expect.stringMatching(/ABORTED|CLOSED/) });
        await expect(engine.generate(requests, long)).rejects.toMatchObject({
          code: expect.stringMatching(/ABORTED|CLOSED/),
        });
      });
    }
  });
});

describe('what cannot be is refused', () => {
  const create = (generation: GenerationDegrees, ranks = 4, transition: TransitionEngine = 'hybridflow') =>
    ParallelEngine.create({
      ...{ shape: smallShape, dtype: 'float32', parts: 4, devices: devicesFor(ranks) },
      ...{ degrees: { pipeline: 2, tensor: 2 }, generation, transition },
    });

  test('degrees that do not divide, and too few devices', async () => {
    await expect(create({ pipeline: 1, tensor: 4 })).rejects.toMatchObject({ code: 'PARALLEL_INVALID' });
    await expect(create({ pipeline: 3, tensor: 1 })).rejects.toMatchObject({ code: 'PARALLEL_INVALID' });
    await expect(create({ pipeline: 1, tensor: 1 }, 3)).rejects.toMatchObject({ code: 'RANKS_INVALID' });
  });

  test('weights that are divided among replicas, beside a generation layout', async () => {
    const [degrees, generation] = [
      { pipeline: 1, tensor: 2, data: 2 },
      { pipeline: 1, tensor: 1 },
    ];
    const setup = { shape: smallShape, dtype: 'float32', parts: 4, degrees, generation } as const;
    await expect(ParallelEngine.create({ ...setup, devices: devicesFor(4), zero: 3 })).rejects.toMatchObject({
      code: 'PARALLEL_INVALID',
      message: expect.stringContaining('leave out generation'),
    });
  });

  test('training on pieces of tensors', async () => {
    const [train, generation] = [
      { pipeline: 1, tensor: 2, data: 2 },
      { pipeline: 1, tensor: 1 },
    ];
    const setup = { shape: smallShape, dtype: 'float32', parts: 4, train, generation } as const;
    const hybrid = await HybridEngine.create({ ...setup, engine: 'ds-chat', devices: devicesFor(4) });
    expect(() => hybrid.trainingWeights(1)).toThrow(expect.objectContaining({ code: 'RANKS_UNSUPPORTED' }));
    await hybrid.close();
  });
});

test('requests are shared out in order, as equally as can be, d_g at a time', () => {
  expect(microReplicas({ pipeline: 2, tensor: 2, data: 1 }, { pipeline: 1, tensor: 1 })).toBe(4);
  for (const items of [0, 1, 3, 4, 7, 16]) {
    for (const shares of [1, 3, 4]) {
      const ranges = evenRanges(items, shares);
      expect(ranges[0]!.begin).toBe(0);
      expect(ranges.at(-1)!.end).toBe(items);
      for (let i = 1; i < shares; i++) expect(ranges[i]!.begin).toBe(ranges[i - 1]!.end);
      const sizes = ranges.map(({ begin, end }) => end - begin);
      expect(Math.max(...sizes) - Math.min(...sizes)).toBeLessThanOrEqual(1);
    }
  }
});
