/**
 * What is divided among data-parallel replicas, and when they exchange it, changes no bit: ZeRO stages, buckets of gradients,
 * overlap with the computation. What is divided, a rank does not hold.
 */
import { describe, expect, test } from 'vitest';
import type { Engine } from '../../src/engine/engine.js';
import { ParallelEngine } from '../../src/engine/parallel-engine.js';
import {
  dtypes,
  readAll,
  requestsOf,
  sameBits,
  sameGenerated,
  sameTensors,
  sampling,
  sequencesOf,
  testDtypes,
} from './support.js';
import {
  batchOf,
  gradientsOf,
  type Layout,
  layoutName,
  microBatchesOf,
  models,
  options,
  outputsOf,
  type Sharing,
  same,
  type Trained,
  train,
  trainOver,
  withDevices,
} from './training-support.js';

type Model = (typeof models)[number];
const [first, tied, biased] = models as [Model, Model, Model];
const nothing: Trained = { norms: [], weights: new Map(), moments: new Map() };

describe.each(models)('$name', (model) => {
  testDtypes(models.indexOf(model), 'every ZeRO stage gives the bits of stage 0', async (dtype) => {
    const expected = await trainOver(model, { data: 2 }, dtype);
    for (const change of [{ zero: 1 }, { zero: 2 }, { zero: 3 }, { zero: 3, recompute: true }]) {
      const layout = { data: 2, ...change };
      same(await trainOver(model, layout, dtype), expected, layoutName(layout));
    }
  });
});

describe('ZeRO stages', () => {
  test.each([
    { model: first, base: { data: 3 } },
    { model: first, base: { tensor: 2, data: 2 } },
    { model: tied, base: { tensor: 2, data: 2 } },
    { model: tied, base: { tensor: 8, data: 2 } },
  ])('of $model.name over $base give the bits of stage 0', async ({ model, base }) => {
    const expected = await trainOver(model, base, 'bfloat16');
    for (const zero of [1, 2, 3]) {
      const layout = { ...base, zero };
      same(await trainOver(model, layout, 'bfloat16'), expected, layoutName(layout));
    }
  });

  test.each([tied, biased])('of $name: buckets and overlap change no bit', async (model) => {
    const expected = await trainOver(model, { data: 2 }, 'float32');
    for (const zero of [0, 1, 2, 3]) {
      for (const [bucketBytes, overlap] of [
        [1, true],
        [1, false],
        [100_000, true],
        [2 ** 40, true],
      ] as const) {
        const layout = { data: 2, zero, bucketBytes, overlap };
        same(await trainOver(model, layout, 'float32'), expected, layoutName(layout));
      }
    }
    const staged = await trainOver(model, { data: 2, pipeline: 2 }, 'float32');
    for (const change of [{ bucketBytes: 1 }, { zero: 1, bucketBytes: 2 ** 40 }, { zero: 1, overlap: false }]) {
      const layout = { data: 2, pipeline: 2, ...change };
      same(await trainOver(model, layout, 'float32'), staged, layoutName(layout));
    }
  });

  const uneven: Sharing = (all, replicas) => [all.slice(0, 4), all.slice(4), [], []].slice(0, replicas);
  test.each([{ data: 3 }, { data: 4 }])('replicas with more, fewer and no micro-batches, %j', async (base) => {
    const work = (engine: Engine) => train(engine, 2, uneven);
    const expected = await trainOver(first, base, 'float32', work);
    for (const zero of [1, 2, 3]) {
      const layout = { ...base, zero };
      same(await trainOver(first, layout, 'float32', work), expected, layoutName(layout));
    }
  });

  test('a replica of several stages without micro-batches', async () => {
    const work = (engine: Engine) => train(engine, 2, (all) => [all, []]);
    const expected = await trainOver(tied, { data: 2 }, 'float32', work);
    for (const layout of [
      { data: 2, pipeline: 2 },
      { data: 2, pipeline: 2, zero: 1 },
    ])
      same(await trainOver(tied, layout, 'float32', work), expected, layoutName(layout));
  });

  test('gradients are the same to read, and the step after that too', async () => {
    const work = async (engine: Engine): Promise<Trained> => {
      const all = microBatchesOf(engine.shape, 1);
      await engine.accumulate([all.slice(0, 2), all.slice(2)], { outputs: outputsOf(engine.shape) }, gradientsOf);
      const gradients = await readAll(engine, 'gradients');
      const { gradientNorm } = await engine.step(options);
      return { norms: [gradientNorm], weights: gradients, moments: await readAll(engine, 'moment1') };
    };
    const expected = await trainOver(tied, { tensor: 2, data: 2 }, 'float32', work);
    for (const zero of [1, 2, 3])
      same(await trainOver(tied, { tensor: 2, data: 2, zero }, 'float32', work), expected, `${zero}`);
  });

  test.each([0, 1, 2, 3])('stage %d: calls between the gradients and the step take nothing from them', async (zero) => {
    const work = (between: boolean) => async (engine: Engine) => {
      const { shape } = engine;
      const all = microBatchesOf(shape, 1);
      await engine.accumulate([all.slice(0, 3), all.slice(3)], { outputs: outputsOf(shape) }, gradientsOf);
      if (between) {
        await engine.forward(batchOf(shape, [90, 90]), { outputs: ['logprobs'] });
        await engine.generate(requestsOf(sequencesOf(shape, [40, 9])), sampling);
      }
      const { gradientNorm } = await engine.step(options);
      return { ...nothing, norms: [gradientNorm], weights: await readAll(engine, 'weights') };
    };
    const layout = { data: 2, zero };
    const expected = await trainOver(tied, layout, 'float32', work(false));
    same(await trainOver(tied, layout, 'float32', work(true)), expected, `stage ${zero}`);
  });

  test('forward with `keep` and backward, one replica without rows', async () => {
    const work = async (engine: Engine): Promise<Trained> => {
      const norms: number[] = [];
      for (const lengths of [[9, 30, 4], [8]]) {
        const batch = batchOf(engine.shape, lengths);
        await engine.backward(
          gradientsOf(await engine.forward(batch, { outputs: ['logprobs', 'entropies'], keep: true })),
        );
        norms.push((await engine.step({ ...options, step: norms.length + 1 })).gradientNorm);
      }
      return { ...nothing, norms, weights: await readAll(engine, 'weights') };
    };
    const expected = await trainOver(first, { data: 2 }, 'float32', work);
    for (const zero of [1, 2, 3]) same(await trainOver(first, { data: 2, zero }, 'float32', work), expected, `${zero}`);
  });
});

describe('divided weights', () => {
  test.each(dtypes)('score and generate as whole ones, %s', async (dtype) => {
    for (const model of [first, tied]) {
      await withDevices(5, async ([own, ...devices]) => {
        const one = await model.open({ device: own!, dtype, parts: 8 });
        const { shape, parts } = one;
        const degrees = { pipeline: 1, tensor: 2, data: 2 };
        const engine = await ParallelEngine.create({ shape, devices, degrees, dtype, parts, zero: 3 });
        for (const [name, data] of await readAll(one, 'weights')) await engine.writeTensor(name, data);
        await engine.publish();
        sameTensors(await readAll(engine, 'weights'), await readAll(one, 'weights'), 'weights');
        for (const lengths of [[9, 30, 4, 17], [8]]) {
          const batch = batchOf(shape, lengths);
          const [actual, expected] = [engine, one].map((each) =>
            each.forward(batch, { outputs: ['logprobs', 'hidden'] }),
          );
          for (const name of ['logprobs', 'hidden'] as const) {
            sameBits((await actual!)[name]!, (await expected!)[name]!, `${name} of ${lengths.length} rows`);
          }
        }
        full(engine);
        for (const lengths of [[5, 3, 20], [7]]) {
          const requests = requestsOf(sequencesOf(shape, lengths));
          const [actual, expected] = [engine, one].map((each) => each.generate(requests, sampling));
          for (const [i, generated] of (await expected!).entries()) {
            sameGenerated((await actual!)[i]!, generated, `request ${i} of ${requests.length}`);
          }
        }
        full(engine);
      });
    }
  });
});

/** Every arena is used to its planned end. */
function full(engine: Engine): void {
  for (const [arena, { planned, highWater }] of Object.entries(engine.memory())) {
    if (!arena.endsWith('scratch')) expect(highWater, arena).toBe(planned);
  }
}

describe('memory of a rank', () => {
  const layouts: Layout[] = [
    { data: 2 },
    { data: 2, zero: 1 },
    { data: 2, zero: 2 },
    { data: 3, zero: 2, bucketBytes: 1 },
    { data: 2, zero: 3 },
    { tensor: 2, data: 2, zero: 3, bucketBytes: 2 ** 40 },
    { data: 3, zero: 3, recompute: true, bucketBytes: 1 },
  ];
  test.each(layouts)('%j: is what was planned, and of what is divided a share', async (layout) => {
    const { data = 1, tensor = 1, zero = 0 } = layout;
    for (const model of [first, tied]) {
      for (const dtype of dtypes) {
        const arenas: Record<string, number>[] = [];
        for (const each of [layout, { tensor }]) {
          await trainOver(model, each, dtype, async (engine) => {
            const trained = await train(engine, 1, (all, replicas) =>
              [all.slice(0, 4), all.slice(4), []].slice(0, replicas),
            );
            full(engine);
            const memory = engine.memory();
            arenas.push(
              Object.fromEntries(
                ['weights', 'gradients', 'optimizer'].map((name) => [name, memory[`rank 0 ${name}`]!.planned]),
              ),
            );
            return trained;
          });
        }
        const [own, whole] = arenas;
        for (const [name, from] of Object.entries({ optimizer: 1, gradients: 2, weights: 3 })) {
          const share = own![name]! / whole![name]!;
          // Pieces are whole rows of panels, and each begins at a multiple of 64 bytes. A tied embedding has one
          // accumulator among what is divided.
          if (zero < from) expect(share, name).toBe(1);
          else expect(share, name).toBeLessThan(1.1 / data);
        }
      }
    }
  });

  test('bytes: each replica gets its pieces of the gradients once, the weights of a unit for forward and for backward', async () => {
    for (const zero of [0, 1, 2, 3]) {
      await trainOver(first, { data: 3, zero, bucketBytes: 1 }, 'bfloat16', async (engine) => {
        const { ranks } = engine as ParallelEngine;
        const received = () => ranks.reduce((sum, rank) => sum + rank.traffic().receivedBytes, 0);
        const before = received();
        const all = microBatchesOf(engine.shape, 1);
        await engine.accumulate([all.slice(0, 4), all.slice(4), []], { outputs: ['logprobs'] }, gradientsOf);
        await engine.step(options);
        const bytes = received() - before;
        const { table } = ranks[0]!;
        const weights = (names: RegExp) =>
          table
            .filter(({ name }) => names.test(name))
            .reduce((sum, { kind, elements }) => sum + elements * (kind === 'matrix' ? 2 : 4), 0);
        const gradients = table.reduce((sum, { elements }) => sum + elements * 4, 0);
        // All-reduce over three ranks: every rank takes two others' parts of its third, then the two other thirds. What
        // forward gathered last, head and last layer, is there for backward; the embedding is not read by it.
        const expected = {
          0: 4 * gradients,
          1: 2 * gradients,
          2: 2 * gradients,
          3: 2 * (gradients + weights(/./) + weights(/^layers\.[01]\./)),
        }[zero];
        expect(bytes, `stage ${zero}`).toBe(expected);
        return nothing;
      });
    }
  });
});

describe('what fails', () => {
  test.each([0, 1, 2, 3])('stage %d: an error of the loss leaves no gradient, and the ranks go on', async (zero) => {
    const layout = { data: 2, zero };
    const expected = await trainOver(tied, layout, 'float32');
    const actual = await trainOver(tied, layout, 'float32', async (engine) => {
      const batches = [[9], [4], [5]].map((lengths) => batchOf(engine.shape, lengths));
      for (const sharing of [
        [batches, batches.slice(1)],
        [batches, []],
      ]) {
        const failing = engine.accumulate(sharing, { outputs: ['logprobs'] }, (outputs, _, index) => {
          if (index === 1) throw new Error('not this one');
          return gradientsOf(outputs);
        });
        await expect(failing).rejects.toThrow('not this one');
      }
      return train(engine);
    });
    same(actual, expected, 'afterwards');
  });

  test.each([0, 1])('stage %d: several calls before a step, all but the last not final', async (zero) => {
    const layout = { data: 2, zero };
    const expected = await trainOver(first, layout, 'float32', (engine) => train(engine, 1));
    const actual = await trainOver(first, layout, 'float32', async (engine) => {
      const all = microBatchesOf(engine.shape, 10);
      const wanted = { outputs: outputsOf(engine.shape), temperature: 0.9 };
      await engine.accumulate([all.slice(0, 1), all.slice(3, 5)], { ...wanted, final: false }, gradientsOf);
      await engine.accumulate([all.slice(1, 3), all.slice(5)], wanted, gradientsOf);
      await expect(engine.accumulate([all, all], wanted, gradientsOf)).rejects.toMatchObject({
        code: 'GRADIENTS_REDUCED',
      });
      const { gradientNorm } = await engine.step(options);
      return {
        norms: [gradientNorm],
        weights: await readAll(engine, 'weights'),
        moments: await readAll(engine, 'moment2'),
      };
    });
    same(actual, expected, 'in two calls');
  });

  test.each([2, 3])('stage %d: one call before a step', async (zero) => {
    await trainOver(first, { data: 2, zero }, 'float32', async (engine) => {
      const all = microBatchesOf(engine.shape, 1);
      await engine.accumulate([all, all], { outputs: ['logprobs'], final: false }, gradientsOf);
      const again = engine.accumulate([all, all], { outputs: ['logprobs'] }, gradientsOf);
      await expect(again).rejects.toMatchObject({ code: 'GRADIENTS_REDUCED' });
      await engine.step(options);
      return train(engine, 1);
    });
  });

  test.each([2, 3])(
    'a gradient that is not finite, stage %d: nothing is updated, and the ranks go on',
    async (zero) => {
      await trainOver(first, { data: 2, zero }, 'float32', async (engine) => {
        const before = await readAll(engine, 'weights');
        const batches = [[batchOf(engine.shape, [9])], []];
        await engine.accumulate(batches, { outputs: ['logprobs'] }, ({ logprobs }) => ({
          logprobs: logprobs!.map(() => Number.POSITIVE_INFINITY),
        }));
        await expect(engine.step(options)).rejects.toMatchObject({ code: 'GRADIENT_NOT_FINITE' });
        sameTensors(await readAll(engine, 'weights'), before, 'weights');
        return train(engine, 1);
      });
    },
  );

  test('divided gradients and weights in a pipeline', async () => {
    for (const zero of [2, 3]) {
      await expect(trainOver(first, { pipeline: 2, data: 2, zero }, 'float32')).rejects.toMatchObject({
        code: 'PARALLEL_INVALID',
        message: expect.stringContaining('parallel.pipeline to 1'),
      });
    }
    await expect(trainOver(first, { data: 2, zero: 4 }, 'float32')).rejects.toMatchObject({ code: 'PARALLEL_INVALID' });
  });
});
