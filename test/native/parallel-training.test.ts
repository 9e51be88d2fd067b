/**
 * Training over ranks. Over pipeline and tensor ranks a step gives one rank's bits, whatever the schedule (DESIGN §2); over
 * data-parallel replicas its bounds; the ZeRO stage changes no bit; each rank holds what the plan says.
 */
import { describe, expect, test } from 'vitest';
import { checkpointTensors } from '../../src/checkpoints/hugging-face.js';
import { createDevice } from '../../src/checkpoints/load-model.js';
import { packBatch, type TokenBatch } from '../../src/data/batch.js';
import type { Device } from '../../src/engine/device.js';
import type { Engine, ForwardResult, MicroBatches, StepOptions, TokenGradients } from '../../src/engine/engine.js';
import { ParallelEngine, type ParallelOptions } from '../../src/engine/parallel-engine.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import {
  dtypes,
  randomModel,
  readAll,
  sameBits,
  sameTensors,
  sequencesOf,
  smallShape,
  type TestModel,
  tinyShape,
} from './support.js';

type Layout = Pick<ParallelOptions, 'schedule' | 'zero' | 'recompute'> & {
  pipeline?: number;
  tensor?: number;
  data?: number;
};

const layoutName = ({ pipeline = 1, tensor = 1, data = 1, zero = 0, schedule = '1f1b', recompute }: Layout): string =>
  `p${pipeline} t${tensor} d${data} zero${zero} ${schedule}${recompute ? ' recompute' : ''}`;

async function withDevices<T>(count: number, run: (devices: Device[]) => Promise<T>): Promise<T> {
  const devices = Array.from({ length: count }, () => createDevice({ threads: 1 }));
  try {
    return await run(devices);
  } finally {
    for (const device of devices) await device.close();
  }
}

const head = { family: 'qwen3', heads: 8, headWidth: 8, keyValueHeads: 2, feedForward: 128, headNorm: true } as const;
const shapes: Record<string, ModelShape> = {
  'key/value heads on two ranks each': smallShape,
  'one key/value head, tied, a vocabulary that leaves a rank nothing': {
    ...{ ...tinyShape, heads: 8, headWidth: 8, keyValueHeads: 1, feedForward: 128, tied: true, vocabulary: 20 },
  },
  'biases, learned positions, tied': {
    ...{ ...tinyShape, family: 'gpt2', heads: 8, keyValueHeads: 8, headWidth: 8, feedForward: 256, tied: true },
    ...{ norm: 'layer', activation: 'gelu-tanh', qkvBias: true, outputBias: true, mlpBias: true },
    positions: { type: 'learned' },
    maxPositions: 128,
  },
  'a bias of shared key/value heads': { ...smallShape, family: 'qwen2', qkvBias: true },
  'a value head': { ...smallShape, head: 'value', headBias: true, tied: false },
};
const models: TestModel[] = Object.entries(shapes).map(([name, shape]) => randomModel(name, shape));
const headNorms = randomModel('head norms', { ...tinyShape, ...head });

const options: StepOptions = {
  ...{ learningRate: 1e-2, betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0.1, clipNorm: 0.5, step: 1 },
};

function batchOf(shape: ModelShape, lengths: readonly number[], seed = 1): TokenBatch {
  return packBatch(sequencesOf(shape, lengths, seed));
}

/** A loss whose gradient depends on the outputs, so that a wrong forward shows as well. */
function gradientsOf(outputs: ForwardResult): TokenGradients {
  const of = (array: Float32Array | undefined, weight: number) =>
    array && Float32Array.from(array, (x, i) => weight * Math.tanh(x) * (1 + (i % 3)) + 0.01);
  const { logprobs, entropies, values } = outputs;
  return Object.fromEntries(
    Object.entries({
      logprobs: of(logprobs, -0.1),
      entropies: of(entropies, 0.02),
      values: of(values, 0.1),
    }).filter(([, array]) => array !== undefined),
  );
}

const outputsOf = (shape: ModelShape) =>
  shape.head === 'language' ? (['logprobs', 'entropies'] as const) : (['values'] as const);

interface Trained {
  norms: number[];
  weights: Map<string, Float32Array>;
  moments: Map<string, Float32Array>;
}

/** Steps over micro-batches of different sizes; those of a replica are its share of the list. */
async function train(engine: Engine, steps = 2): Promise<Trained> {
  const norms: number[] = [];
  const { shape, replicas } = engine;
  const outputs = outputsOf(shape);
  for (let step = 1; step <= steps; step++) {
    const all = [[33, 2], [17], [5, 9, 1], [40], [3, 3], [12]].map((lengths, i) =>
      batchOf(shape, lengths, 10 * step + i),
    );
    const each = all.length / replicas;
    const microBatches: MicroBatches = Array.from({ length: replicas }, (_, r) => all.slice(r * each, (r + 1) * each));
    await engine.accumulate(microBatches, { outputs, temperature: 0.9 }, gradientsOf);
    norms.push((await engine.step({ ...options, step })).gradientNorm);
  }
  return { norms, weights: await readAll(engine, 'weights'), moments: await readAll(engine, 'moment2') };
}

async function trainOver(
  model: TestModel,
  { pipeline = 1, tensor = 1, data = 1, ...layout }: Layout,
  dtype: (typeof dtypes)[number],
  work: (engine: Engine) => Promise<Trained> = train,
): Promise<Trained> {
  return withDevices(1 + pipeline * tensor * data, async ([own, ...devices]) => {
    const one = await model.open({ device: own!, dtype, parts: 8, train: true });
    const { shape, parts } = one;
    const degrees = { pipeline, tensor, data };
    const engine = await ParallelEngine.create({ shape, devices, degrees, dtype, parts, train: true, ...layout });
    for (const { name } of checkpointTensors(one)) await engine.writeTensor(name, await one.readTensor(name));
    await engine.publish();
    return work(engine);
  });
}

const trainAlone = (model: TestModel, dtype: (typeof dtypes)[number], recompute = false): Promise<Trained> =>
  withDevices(1, async ([device]) =>
    train(await model.open({ device: device!, dtype, parts: 8, train: true, recompute })),
  );

function same(actual: Trained, expected: Trained, what: string): void {
  expect(actual.norms, `${what}: gradient norms`).toEqual(expected.norms);
  sameTensors(actual.weights, expected.weights, `${what}: weights`);
  sameTensors(actual.moments, expected.moments, `${what}: second moments`);
}

describe.each(models)('$name', (model) => {
  test.each(dtypes)('two steps over pipeline and tensor ranks give the bits of one rank, %s', async (dtype) => {
    const expected = await trainAlone(model, dtype);
    const layers = model.shape.layers;
    const layouts: Layout[] = [
      { tensor: 2 },
      { tensor: 4, recompute: true },
      { tensor: 8 },
      { pipeline: layers },
      { pipeline: layers, schedule: 'gpipe' },
      { pipeline: 2, tensor: 4, recompute: true },
      { pipeline: 2, tensor: 2, schedule: 'gpipe' },
    ];
    for (const layout of layouts) same(await trainOver(model, layout, dtype), expected, layoutName(layout));
  });
});

/** Largest difference over the tensors, each relative to its largest entry. */
function distance(actual: ReadonlyMap<string, Float32Array>, expected: ReadonlyMap<string, Float32Array>): number {
  let worst = 0;
  for (const [name, reference] of expected) {
    const largest = reference.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
    const data = actual.get(name)!;
    for (const [i, x] of reference.entries()) worst = Math.max(worst, Math.abs(data[i]! - x) / (largest || 1));
  }
  return worst;
}

describe('data-parallel replicas', () => {
  const [model] = models;
  const gradients = (engine: Engine): Promise<Map<string, Float32Array>> => readAll(engine, 'gradients');
  const accumulated = async (engine: Engine): Promise<Trained> => {
    const { shape, replicas } = engine;
    const all = [[33, 2], [17], [5, 9, 1], [40]].map((lengths, i) => batchOf(shape, lengths, i));
    const each = all.length / replicas;
    const own = Array.from({ length: replicas }, (_, r) => all.slice(r * each, (r + 1) * each));
    await engine.accumulate(own, { outputs: outputsOf(shape) }, gradientsOf);
    const weights = await gradients(engine);
    return { norms: [(await engine.step({ ...options, learningRate: 0 })).gradientNorm], weights, moments: new Map() };
  };

  test.each([{ data: 2 }, { data: 4 }, { data: 2, pipeline: 2 }, { data: 2, tensor: 2 }])(
    '%j: gradients within the bound of one rank',
    async (layout) => {
      const expected = await withDevices(1, async ([device]) =>
        accumulated(await model!.open({ device: device!, dtype: 'float32', parts: 8, train: true })),
      );
      const actual = await trainOver(model!, layout, 'float32', accumulated);
      expect(distance(actual.weights, expected.weights)).toBeLessThanOrEqual(5e-6);
      expect(Math.abs(actual.norms[0]! / expected.norms[0]! - 1)).toBeLessThanOrEqual(1e-6);
    },
  );

  test.each(dtypes)('ZeRO stage, schedule and recomputation change no bit, %s', async (dtype) => {
    for (const base of [{ data: 3 }, { data: 2, pipeline: 2, tensor: 2 }]) {
      const expected = await trainOver(model!, base, dtype);
      for (const change of [{ zero: 1 }, { zero: 1, schedule: 'gpipe', recompute: true }] as const) {
        const layout = { ...base, ...change };
        same(await trainOver(model!, layout, dtype), expected, layoutName(layout));
      }
    }
  });

  test('replicas hold the same weights, and a share of the rows of a forward pass each', async () => {
    await trainOver(model!, { data: 3 }, 'float32', async (engine) => {
      const trained = await train(engine);
      const { ranks } = engine as ParallelEngine;
      for (const rank of ranks) sameTensors(await readAll(rank, 'weights'), trained.weights, 'weights of a rank');
      for (const lengths of [[9, 30, 4, 4, 17], [8], [6, 6]]) {
        const batch = batchOf(engine.shape, lengths);
        const { logprobs } = await engine.forward(batch, { outputs: ['logprobs'] });
        const alone = await ranks[1]!.forward(batch, { outputs: ['logprobs'] });
        sameBits(logprobs!, alone.logprobs!, `${lengths.length} rows`);
      }
      return trained;
    });
  });
});

test('head norms: gradients over tensor ranks within the bound', async () => {
  const work = async (engine: Engine): Promise<Trained> => {
    await engine.accumulate([[batchOf(engine.shape, [33, 7])]], { outputs: outputsOf(engine.shape) }, gradientsOf);
    return { norms: [], weights: await readAll(engine, 'gradients'), moments: new Map() };
  };
  const expected = await withDevices(1, async ([device]) =>
    work(await headNorms.open({ device: device!, dtype: 'float32', parts: 8, train: true })),
  );
  for (const tensor of [2, 8]) {
    const actual = await trainOver(headNorms, { tensor }, 'float32', work);
    expect(distance(actual.weights, expected.weights)).toBeLessThanOrEqual(5e-6);
  }
});

describe('memory of a rank that trains', () => {
  const layouts: Layout[] = [
    { pipeline: 2, tensor: 2 },
    { pipeline: 2, tensor: 1, schedule: 'gpipe' },
    { tensor: 8 },
    { data: 2, zero: 1 },
    { data: 3, pipeline: 2, zero: 1, recompute: true },
  ];
  test.each(layouts)('%j: is what was planned', async (layout) => {
    for (const dtype of dtypes) {
      await trainOver(models[0]!, layout, dtype, async (engine) => {
        const trained = await train(engine, 1);
        for (const [arena, { planned, highWater }] of Object.entries(engine.memory())) {
          if (!arena.endsWith('scratch')) expect(highWater, arena).toBe(planned);
        }
        return trained;
      });
    }
  });
});

describe('what fails', () => {
  test.each([{ pipeline: 2, tensor: 2 }, { data: 2, pipeline: 2, schedule: 'gpipe' as const }, { tensor: 2 }])(
    '%j: an error of the loss is thrown on, leaves no gradient, and the ranks go on',
    async (layout) => {
      const expected = await trainOver(models[0]!, layout, 'float32');
      const actual = await trainOver(models[0]!, layout, 'float32', async (engine) => {
        const batches = Array.from({ length: engine.replicas }, () =>
          [[9], [4], [5]].map((l) => batchOf(engine.shape, l)),
        );
        const failing = engine.accumulate(batches, { outputs: ['logprobs'] }, (outputs, _, index) => {
          if (index === 1) throw new Error('not this one');
          return gradientsOf(outputs);
        });
        await expect(failing).rejects.toThrow('not this one');
        return train(engine);
      });
      same(actual, expected, 'afterwards');
    },
  );

  test('a gradient that is not finite: nothing is updated, and the ranks go on', async () => {
    await trainOver(models[0]!, { data: 2, tensor: 2 }, 'float32', async (engine) => {
      const before = await readAll(engine, 'weights');
      const batches = [[batchOf(engine.shape, [9])], [batchOf(engine.shape, [9])]];
      await engine.accumulate(batches, { outputs: ['logprobs'] }, ({ logprobs }) => ({
        logprobs: logprobs!.map(() => Number.POSITIVE_INFINITY),
      }));
      await expect(engine.step(options)).rejects.toMatchObject({ code: 'GRADIENT_NOT_FINITE' });
      sameTensors(await readAll(engine, 'weights'), before, 'weights');
      expect((await engine.forward(batches[0]![0]!, { outputs: ['logprobs'] })).logprobs).toHaveLength(9);
      return { norms: [], weights: before, moments: new Map() };
    });
  });

  test('backward without a forward that kept, and after another call', async () => {
    await trainOver(models[0]!, { pipeline: 2 }, 'float32', async (engine) => {
      const batch = batchOf(engine.shape, [5]);
      await expect(engine.backward({})).rejects.toMatchObject({ code: 'NO_FORWARD' });
      await engine.forward(batch, { outputs: ['logprobs'], keep: true });
      await engine.forward(batch, { outputs: ['logprobs'] });
      await expect(engine.backward({})).rejects.toMatchObject({ code: 'NO_FORWARD' });
      return train(engine, 1);
    });
  });
});
