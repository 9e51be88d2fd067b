/**
 * Bit for bit at sizes and parts that the fixtures do not have (DESIGN §2): every small batch size and those around the blocks
 * of the kernels, 1 to 8 parts, the update; and gradients against finite differences.
 */
import { describe, expect, test } from 'vitest';
import { packBatch } from '../../src/data/batch.js';
import type { DeviceOptions } from '../../src/engine/device.js';
import type { Dtype } from '../../src/engine/engine.js';
import type { NativeEngine } from '../../src/engine/native-engine.js';
import { slow } from '../conditions.js';
import {
  dtypes,
  instructionSets,
  joined,
  random,
  randomModel,
  readAll,
  sameBits,
  sameScores,
  sameTensors,
  scoreAlone,
  scoreTogether,
  sequencesOf,
  smallShape,
  type TestModel,
  tinyShape,
  withEngine,
} from './support.js';

const tiny = randomModel('tiny', tinyShape);
const small = randomModel('small', smallShape);
const sizes = [...Array.from({ length: 33 }, (_, i) => i + 1), 64, 255, 256, 257, 513];

describe.each(dtypes)('sizes, %s', (dtype) => {
  test(`a batch of any of ${sizes.length} sizes gives each sequence its own bits`, () =>
    withEngine(tiny, { dtype }, async (engine) => {
      const sequences = sequencesOf(
        tinyShape,
        Array.from({ length: 513 }, (_, i) => 1 + ((i * 7) % 5)),
      );
      const alone = await scoreAlone(engine, sequences);
      for (const size of sizes) {
        const scores = await scoreTogether(engine, sequences.slice(0, size));
        sameScores(scores, alone.slice(0, size), `${size} sequences`);
      }
    }));

  test('a sequence of any of these lengths gives its tokens the same bits', () =>
    withEngine(tiny, { dtype }, async (engine) => {
      const [longest] = sequencesOf(tinyShape, [1024]);
      const [whole] = await scoreTogether(engine, [longest!]);
      for (const size of sizes) {
        const [scores] = await scoreTogether(engine, [longest!.slice(0, size)]);
        sameBits(scores!.entropies, whole!.entropies.subarray(0, size), `entropies, ${size} tokens`);
        sameBits(scores!.logprobs.subarray(0, size - 1), whole!.logprobs.subarray(0, size - 1), `${size} tokens`);
      }
    }));

  test('a temperature has its own bits, alone and together', () =>
    withEngine(tiny, { dtype }, async (engine) => {
      const sequences = sequencesOf(tinyShape, [5, 40, 3]);
      const alone = await scoreAlone(engine, sequences, { temperature: 0.7 });
      sameScores(await scoreTogether(engine, sequences, { temperature: 0.7 }), alone, 'temperature 0.7');
      expect(alone).not.toEqual(await scoreAlone(engine, sequences));
    }));
});

/** What a mini-batch of two micro-batches computes: scores, gradients, and the state after the update. */
async function update(engine: NativeEngine, sequences: readonly Int32Array[], cut: number) {
  const next = random(5);
  const drawn = sequences.map(({ length }) => Float32Array.from({ length }, () => 2 * next() - 1));
  const scores = [];
  for (const [begin, end] of [
    [0, cut],
    [cut, sequences.length],
  ] as const) {
    const batch = sequences.slice(begin, end);
    scores.push(...(await scoreTogether(engine, batch, { keep: true })));
    await engine.backward({ logprobs: joined(drawn.slice(begin, end)), entropies: joined(drawn.slice(begin, end)) });
  }
  const gradients = await readAll(engine, 'gradients');
  const { gradientNorm } = await engine.step({
    learningRate: 1e-2,
    betas: [0.9, 0.95],
    epsilon: 1e-8,
    weightDecay: 0.1,
    clipNorm: 1,
    step: 1,
  });
  return {
    scores,
    gradients,
    gradientNorm,
    weights: await readAll(engine, 'weights'),
    moment1: await readAll(engine, 'moment1'),
    moment2: await readAll(engine, 'moment2'),
    after: await scoreTogether(engine, sequences),
  };
}

type Update = Awaited<ReturnType<typeof update>>;

function sameUpdate(actual: Update, expected: Update, what: string): void {
  sameScores(actual.scores, expected.scores, what);
  for (const space of ['gradients', 'moment1', 'moment2', 'weights'] as const) {
    sameTensors(actual[space], expected[space], `${what}: ${space}`);
  }
  expect(actual.gradientNorm, what).toBe(expected.gradientNorm);
  sameScores(actual.after, expected.after, `${what}: after the update`);
}

describe.each(dtypes.flatMap((dtype) => [1, 4, 8].map((parts) => ({ dtype, parts }))))(
  'a mini-batch in $parts parts, $dtype',
  ({ dtype, parts }) => {
    const sequences = sequencesOf(smallShape, [40, 3, 17, 1, 70, 22]);
    const run = (options: DeviceOptions & { isa?: string; recompute?: boolean }, cut = 3) =>
      withEngine(small, { dtype, parts, train: true, ...options }, (engine) => update(engine, sequences, cut));
    let plain: Promise<Update> | undefined;
    const baseline = () => {
      plain ??= run({});
      return plain;
    };

    test('gives the same bits for any threads, instruction set, cut and with recomputation', async () => {
      sameUpdate(await run({}, 5), await baseline(), 'another cut');
      sameUpdate(await run({ threads: 1 }), await baseline(), 'one thread');
      sameUpdate(await run({ threads: 3, recompute: true }), await baseline(), 'three threads, recomputation');
      for (const isa of instructionSets()) sameUpdate(await run({ isa }), await baseline(), isa);
    });

    slow('gives the bits of the reference', async () => {
      sameUpdate(await run({ implementation: 'reference' }), await baseline(), 'reference');
    });

    test('moves the weights and the scores', async () => {
      const { scores, after, moment1 } = await baseline();
      expect(after).not.toEqual(scores);
      expect([...moment1.values()].every((data) => data.some((x) => x !== 0))).toBe(true);
    });
  },
);

test.each(dtypes)('the number of parts changes roundings, and nothing but roundings: %s', async (dtype) => {
  const sequences = sequencesOf(smallShape, [60, 7, 33]);
  const inParts = (parts: number) =>
    withEngine(small, { dtype, parts }, async (engine) =>
      joined((await scoreTogether(engine, sequences)).map(({ entropies }) => entropies)),
    );
  const [one, four, eight] = [await inParts(1), await inParts(4), await inParts(8)];
  const bound = dtype === 'float32' ? 1e-4 : 0.2;
  for (const other of [four, eight]) {
    const largest = other.reduce((most, x, i) => Math.max(most, Math.abs(x - one[i]!)), 0);
    expect(largest).toBeLessThan(bound);
    expect(largest).toBeGreaterThan(0);
  }
});

/** sum of weights x (log-prob, entropy) over all tokens, in float64. */
async function loss(engine: NativeEngine, sequences: readonly Int32Array[], weights: Float32Array): Promise<number> {
  const { logprobs, entropies } = await engine.forward(packBatch(sequences), { outputs: ['logprobs', 'entropies'] });
  return weights.reduce((sum, w, i) => sum + w * logprobs![i]! - 0.5 * w * entropies![i]!, 0);
}

/** d loss / d step along each tensor's gradient, by central differences, beside the gradient's own squared length. */
async function slopes(model: TestModel, dtype: Dtype): Promise<{ name: string; measured: number; exact: number }[]> {
  return withEngine(model, { dtype, train: true, parts: 2 }, async (engine) => {
    const sequences = sequencesOf(model.shape, [30, 9, 50]);
    const next = random(9);
    const weights = Float32Array.from({ length: 89 }, () => 2 * next() - 1);
    await engine.forward(packBatch(sequences), { outputs: ['logprobs'], keep: true });
    await engine.backward({ logprobs: weights, entropies: weights.map((w) => -0.5 * w) });
    const results = [];
    for (const [name, gradient] of await readAll(engine, 'gradients')) {
      const exact = Math.sqrt(gradient.reduce((sum, g) => sum + g * g, 0));
      const before = await engine.readTensor(name);
      const step = 2e-3 * Math.sqrt(before.reduce((sum, w) => sum + w * w, 0));
      const at = async (sign: number) => {
        await engine.writeTensor(
          name,
          before.map((w, i) => w + (sign * step * gradient[i]!) / exact),
        );
        await engine.publish();
        return loss(engine, sequences, weights);
      };
      const measured = ((await at(1)) - (await at(-1))) / (2 * step);
      await engine.writeTensor(name, before);
      results.push({ name, measured, exact });
    }
    await engine.publish();
    return results;
  });
}

test('gradients are the slopes of the loss', async () => {
  for (const { name, measured, exact } of await slopes(tiny, 'float32')) {
    expect(Math.abs(measured / exact - 1), `${name}: ${measured} measured, ${exact} computed`).toBeLessThan(0.02);
  }
});
