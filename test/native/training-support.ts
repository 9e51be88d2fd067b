/** What tests of training over ranks share: models, a loss, layouts, and steps whose results are compared bit by bit. */
import { expect } from 'vitest';
import { checkpointTensors } from '../../src/checkpoints/hugging-face.js';
import { createDevice } from '../../src/checkpoints/load-model.js';
import { packBatch, type TokenBatch } from '../../src/data/batch.js';
import type { Device } from '../../src/engine/device.js';
import type { Engine, ForwardResult, MicroBatches, StepOptions, TokenGradients } from '../../src/engine/engine.js';
import { ParallelEngine, type ParallelOptions } from '../../src/engine/parallel-engine.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import {
  type dtypes,
  randomModel,
  readAll,
  sameTensors,
  sequencesOf,
  smallShape,
  type TestModel,
  tinyShape,
} from './support.js';

export type Layout = Pick<
  ParallelOptions,
  'schedule' | 'zero' | 'recompute' | 'bucketBytes' | 'overlap' | 'generation' | 'transition'
> & {
  pipeline?: number;
  tensor?: number;
  data?: number;
};

export const layoutName = ({ pipeline = 1, tensor = 1, data = 1, zero = 0, ...rest }: Layout): string =>
  `p${pipeline} t${tensor} d${data} zero${zero} ${JSON.stringify(rest)}`;

export async function withDevices<T>(count: number, run: (devices: Device[]) => Promise<T>): Promise<T> {
  const devices = Array.from({ length: count }, (_, gpu) => createDevice({ threads: 1, gpu }));
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
export const models: TestModel[] = Object.entries(shapes).map(([name, shape]) => randomModel(name, shape));
export const headNorms = randomModel('head norms', { ...tinyShape, ...head });

export const options: StepOptions = {
  ...{ learningRate: 1e-2, betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0.1, clipNorm: 0.5, step: 1 },
};

export function batchOf(shape: ModelShape, lengths: readonly number[], seed = 1): TokenBatch {
  return packBatch(sequencesOf(shape, lengths, seed));
}

/** A loss whose gradient depends on the outputs, so that a wrong forward shows as well. */
export function gradientsOf(outputs: ForwardResult): TokenGradients {
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

export const outputsOf = (shape: ModelShape) =>
  shape.head === 'language' ? (['logprobs', 'entropies'] as const) : (['values'] as const);

export interface Trained {
  norms: number[];
  weights: Map<string, Float32Array>;
  moments: Map<string, Float32Array>;
}

/** Of the micro-batches of a step those of each replica. */
export type Sharing = (all: readonly TokenBatch[], replicas: number) => MicroBatches;

const equally: Sharing = (all, replicas) => {
  const each = all.length / replicas;
  return Array.from({ length: replicas }, (_, r) => all.slice(r * each, (r + 1) * each));
};

export const microBatchesOf = (shape: ModelShape, seed: number): TokenBatch[] =>
  [[33, 2], [17], [5, 9, 1], [40], [3, 3], [12]].map((lengths, i) => batchOf(shape, lengths, seed + i));

/** Steps over micro-batches of different sizes. */
export async function train(engine: Engine, steps = 2, sharing = equally): Promise<Trained> {
  const norms: number[] = [];
  const { shape, replicas } = engine;
  const outputs = outputsOf(shape);
  for (let step = 1; step <= steps; step++) {
    const microBatches = sharing(microBatchesOf(shape, 10 * step), replicas);
    await engine.accumulate(microBatches, { outputs, temperature: 0.9 }, gradientsOf);
    norms.push((await engine.step({ ...options, step })).gradientNorm);
  }
  return { norms, weights: await readAll(engine, 'weights'), moments: await readAll(engine, 'moment2') };
}

/** What `work`, by default steps, gives with a model over ranks. */
export async function trainOver<T = Trained>(
  model: TestModel,
  { pipeline = 1, tensor = 1, data = 1, ...layout }: Layout,
  dtype: (typeof dtypes)[number],
  work: (engine: Engine) => Promise<T> = train as (engine: Engine) => Promise<T>,
): Promise<T> {
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

export function same(actual: Trained, expected: Trained, what: string): void {
  expect(actual.norms, `${what}: gradient norms`).toEqual(expected.norms);
  sameTensors(actual.weights, expected.weights, `${what}: weights`);
  sameTensors(actual.moments, expected.moments, `${what}: second moments`);
}
