/**
 * Training over ranks. Over pipeline and tensor ranks a step gives one rank's bits, whatever the schedule (DESIGN §2); over
 * data-parallel replicas its bounds; the ZeRO stage changes no bit; each rank holds what the plan says.
 */
import { describe, expect, test } from 'vitest';
import type { Engine } from '../../src/engine/engine.js';
import type { ParallelEngine } from '../../src/engine/parallel-engine.js';
import { dtypes, readAll, sameBits, sameTensors, type TestModel, testDtypes } from './support.js';
import {
  batchOf,
  gradientsOf,
  headNorms,
  type Layout,
  layoutName,
  models,
  options,
  outputsOf,
  same,
  type Trained,
  train,
  trainOver,
  withDevices,
} from './training-support.js';

const trainAlone = (model: TestModel, dtype: (typeof dtypes)[number], recompute = false): Promise<Trained> =>
  withDevices(1, async ([device]) =>
    train(await model.open({ device: device!, dtype, parts: 8, train: true, recompute })),
  );

describe.each(models)('$name', (model) => {
  testDtypes(
    models.indexOf(model),
    'two steps over pipeline and tensor ranks give the bits of one rank',
    async (dtype) => {
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
    },
  );
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
