/**
 * Parity with transformers on every checkpoint of test/fixtures/models (its README explains the numbers). float32: log-probs and
 * scores within 4x the file's own error, everything else within 4x the largest error that the README lists; bfloat16: log-probs
 * and scores within 1.5x the file's.
 */
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { checkpointTensors } from '../../src/checkpoints/hugging-face.js';
import { createDevice, createEngine } from '../../src/checkpoints/load-model.js';
import { packBatch } from '../../src/data/batch.js';
import { scorePosition } from '../../src/data/score-position.js';
import type { Device } from '../../src/engine/device.js';
import type { Dtype, Engine, ForwardOutput } from '../../src/engine/engine.js';
import { canonicalName, checkpointNames } from '../../src/layout/checkpoint-names.js';
import type { Head } from '../../src/layout/model-shape.js';
import {
  type Golden,
  goldenDirectories,
  type PreferenceLoss,
  readGolden,
  readGoldenTensors,
  type Trajectory,
} from './golden.js';

/** 4x the largest errors of the library in float32, from the README. */
const tolerance = {
  entropies: 4 * 5e-6,
  logits: 4 * 2e-5,
  hidden: 4 * 1e-5,
  /** of the tensor's largest entry */ gradients: 4 * 4e-6,
  /** relative */ gradientNorm: 4 * 2e-7,
  losses: 4 * 8e-6,
  /** relative */ trajectoryNorm: 4 * 2e-5,
  weights: 4 * 2e-4,
  /** relative */ l2: 4 * 2e-5,
  sums: 4 * 3e-4,
};

let device: Device;
beforeAll(() => {
  device = createDevice({ threads: 2 });
});
afterAll(() => device.close());

type Numbers = ArrayLike<number>;

function largestDifference(actual: Numbers, expected: Numbers): number {
  expect(actual.length).toBe(expected.length);
  let largest = 0;
  for (let i = 0; i < expected.length; i++) {
    const difference = Math.abs(actual[i]! - expected[i]!);
    if (!(difference <= largest)) largest = difference; // NaN stays
  }
  return largest;
}
const expectWithin = (actual: Numbers, expected: Numbers, bound: number, what: string) =>
  expect(largestDifference(actual, expected), what).toBeLessThanOrEqual(bound);
const expectRelative = (actual: number, expected: number, bound: number, what: string) =>
  expect(Math.abs(actual / expected - 1), what).toBeLessThanOrEqual(bound);

const pack = (sequences: readonly number[][]) => packBatch(sequences.map((tokens) => Int32Array.from(tokens)));

/** Per-token results of sequences computed in one batch, a row per sequence. */
async function rows(engine: Engine, sequences: readonly number[][], output: 'logprobs' | 'entropies' | 'values') {
  const result = await engine.forward(pack(sequences), { outputs: [output] });
  return split(result[output]!, sequences);
}

function split(values: Float32Array, sequences: readonly number[][]): Float32Array[] {
  let at = 0;
  return sequences.map((tokens) => {
    at += tokens.length;
    return values.subarray(at - tokens.length, at);
  });
}

/** A gradient array of a batch from one row per sequence; short rows end with zeros. */
function joined(sequences: readonly number[][], gradients: readonly Numbers[]): Float32Array {
  return Float32Array.from(sequences.flatMap((tokens, b) => tokens.map((_, t) => gradients[b]![t] ?? 0)));
}

const l2 = (data: Numbers) =>
  Math.sqrt(Array.prototype.reduce.call(data, (sum, x) => (sum as number) + (x as number) ** 2, 0) as number);

async function compareGradients(
  engine: Engine,
  golden: ReadonlyMap<string, Float64Array>,
  prefix: string,
  norm: number,
  rename: (name: string) => string = (name) => name,
): Promise<void> {
  const names = checkpointNames(engine.shape);
  const expected = new Map<string, Float64Array>();
  for (const [key, data] of golden) {
    if (key.startsWith(prefix)) expected.set(canonicalName(names, rename(key.slice(prefix.length))), data);
  }
  expect([...expected.keys()].sort()).toEqual(
    checkpointTensors(engine)
      .map(({ name }) => name)
      .sort(),
  );
  let squares = 0;
  for (const [name, reference] of expected) {
    const gradient = await engine.readTensor(name, 'gradients');
    const largest = reference.reduce((most, x) => Math.max(most, Math.abs(x)), 0);
    expectWithin(gradient, reference, tolerance.gradients * largest, name);
    squares += l2(gradient) ** 2;
  }
  expectRelative(Math.sqrt(squares), norm, tolerance.gradientNorm, 'gradient norm');
}

/** Runs AdamW as the file says; `lossAndGradient` computes the loss and calls backward. */
async function compareTrajectory(
  engine: Engine,
  golden: ReadonlyMap<string, Float64Array>,
  trajectory: Trajectory,
  lossAndGradient: (learn: boolean) => Promise<number>,
): Promise<void> {
  const { adamw } = trajectory;
  const losses: number[] = [];
  for (let step = 1; step <= adamw.steps; step++) {
    losses.push(await lossAndGradient(true));
    const { gradientNorm } = await engine.step({
      learningRate: adamw.lr,
      betas: [adamw.beta1, adamw.beta2],
      epsilon: adamw.eps,
      weightDecay: adamw.weight_decay,
      clipNorm: adamw.max_grad_norm,
      step,
    });
    expectRelative(gradientNorm, trajectory.grad_norms[step - 1]!, tolerance.trajectoryNorm, `norm of step ${step}`);
  }
  losses.push(await lossAndGradient(false));
  expectWithin(losses, [...trajectory.losses, trajectory.final_loss], tolerance.losses, 'losses');

  const names = checkpointNames(engine.shape);
  const noisy = new Set(trajectory.ill_conditioned);
  for (const [name, expected] of Object.entries(trajectory.final)) {
    const data = await engine.readTensor(canonicalName(names, name));
    const sum = data.reduce((a, x) => a + x, 0);
    const absolute = data.reduce((a, x) => a + Math.abs(x), 0);
    // An entry without a gradient moves by up to the learning rate in every step, in a direction that rounding decides.
    const noise = noisy.has(name) ? adamw.lr * adamw.steps : 0;
    expectWithin(
      [sum, absolute],
      [expected.sum, expected.abs_sum],
      tolerance.sums + noise * data.length,
      `sums of ${name}`,
    );
    const bound = expected.l2 * tolerance.l2 + noise * Math.sqrt(data.length);
    expectWithin([l2(data)], [expected.l2], bound, `l2 of ${name}`);
  }
  for (const key of trajectory.final_tensors) {
    const name = key.slice(key.indexOf('.') + 1);
    if (noisy.has(name)) continue;
    expectWithin(await engine.readTensor(canonicalName(names, name)), golden.get(key)!, tolerance.weights, key);
  }
}

describe.each(goldenDirectories())('$name', ({ directory }) => {
  const golden: Golden = readGolden(directory);
  const sequences = golden.sequences.map(({ tokens }) => tokens);
  const tokens32 = Math.max(
    4 * (golden.errors.float32[golden.kind === 'lm' ? 'logprobs' : 'scores']?.max_abs ?? 0),
    1e-5,
  );
  const tokens16 = 1.5 * (golden.errors.bfloat16[golden.kind === 'lm' ? 'logprobs' : 'scores']?.max_abs ?? 0);

  async function open(dtype: Dtype, train = false, head?: Head): Promise<Engine & AsyncDisposable> {
    return createEngine({ model: directory, device, dtype, train, ...(head && { head }) });
  }
  async function single(
    engine: Engine,
    sequence: number,
    output: ForwardOutput & ('logits' | 'hidden'),
  ): Promise<Float32Array> {
    const result = await engine.forward(pack([sequences[sequence]!]), { outputs: [output] });
    return result[output]!;
  }

  if (golden.hidden) {
    const { sequence, tensor } = golden.hidden;
    test('hidden states', async () => {
      await using engine = await open('float32');
      const expected = (await readGoldenTensors(directory)).get(tensor)!;
      expectWithin(await single(engine, sequence, 'hidden'), expected, tolerance.hidden, 'hidden');
    });
  }

  if (golden.kind === 'lm') languageModelTests();
  if (golden.value_head) valueHeadTest(golden.value_head);
  if (golden.kind === 'rm') rewardModelTests();

  function languageModelTests(): void {
    test.each<[Dtype, number]>([
      ['float32', tokens32],
      ['bfloat16', tokens16],
    ])('log-probs in %s', async (dtype, bound) => {
      await using engine = await open(dtype);
      const actual = await rows(engine, sequences, 'logprobs');
      for (const [b, { logprobs }] of golden.sequences.entries()) {
        expectWithin(actual[b]!.subarray(0, -1), logprobs, bound, `sequence ${b}`);
        expect(actual[b]!.at(-1)).toBe(0);
      }
    });

    test('entropies', async () => {
      await using engine = await open('float32');
      const actual = await rows(engine, sequences, 'entropies');
      for (const [b, { entropies }] of golden.sequences.entries()) {
        expectWithin(actual[b]!, entropies, tolerance.entropies, `sequence ${b}`);
      }
    });

    if (golden.logits) {
      const { sequence, tensor } = golden.logits;
      test('logits', async () => {
        await using engine = await open('float32');
        const expected = (await readGoldenTensors(directory)).get(tensor)!;
        expectWithin(await single(engine, sequence, 'logits'), expected, tolerance.logits, 'logits');
      });
    }

    if (golden.loss) {
      const { logprob_weights, entropy_weights, value, grad_norm, grad_prefix } = golden.loss;
      test('gradients of every parameter', async () => {
        await using engine = await open('float32', true);
        const { logprobs, entropies } = await engine.forward(pack(sequences), {
          outputs: ['logprobs', 'entropies'],
          keep: true,
        });
        const gradients = {
          logprobs: joined(sequences, logprob_weights),
          entropies: joined(sequences, entropy_weights),
        };
        const loss = gradients.logprobs.reduce(
          (sum, w, i) => sum + w * logprobs![i]! + gradients.entropies[i]! * entropies![i]!,
          0,
        );
        const bound = Math.max(tolerance.losses, 4 * golden.errors.float32.loss_abs);
        expectWithin([loss], [value], bound, 'loss');
        await engine.backward(gradients);
        await compareGradients(engine, await readGoldenTensors(directory), grad_prefix, grad_norm);
      });
    }

    const { sft } = golden;
    if (sft) {
      test('the AdamW trajectory of sft', async () => {
        await using engine = await open('float32', true);
        const predicted = sft.sequences.reduce((sum, tokens) => sum + tokens.length - 1, 0);
        const gradient = joined(
          sft.sequences,
          sft.sequences.map((tokens) => tokens.slice(1).map(() => -1 / predicted)),
        );
        await compareTrajectory(engine, await readGoldenTensors(directory), sft, async (learn) => {
          const { logprobs } = await engine.forward(pack(sft.sequences), { outputs: ['logprobs'], keep: learn });
          if (learn) await engine.backward({ logprobs: gradient });
          return -logprobs!.reduce((sum, x) => sum + x, 0) / predicted;
        });
      });
    }

    const { greedy } = golden;
    if (greedy) {
      test('greedy continuations', async () => {
        await using engine = await open('float32');
        const requests = greedy.map(({ prompt, tokens }, id) => ({
          prompt: Int32Array.from(prompt),
          id,
          maxNewTokens: tokens.length,
        }));
        const sampling = { maxNewTokens: 1, temperature: 0, topP: 1, topK: 0, stopTokens: [], seed: 0 };
        const results = await engine.generate(requests, sampling);
        for (const [i, { tokens, margins, logprobs }] of greedy.entries()) {
          const unclear = margins.findIndex((margin) => margin <= 2 * tolerance.logits);
          const length = unclear < 0 ? tokens.length : unclear;
          expect(length).toBeGreaterThan(0);
          expect([...results[i]!.tokens.subarray(0, length)]).toEqual(tokens.slice(0, length));
          expectWithin(
            results[i]!.logprobs.subarray(0, length),
            logprobs.slice(0, length),
            tokens32,
            `continuation ${i}`,
          );
          expect([results[i]!.tokens.length, results[i]!.finish]).toEqual([tokens.length, 'length']);
        }
      });
    }
  }

  function valueHeadTest(head: NonNullable<Golden['value_head']>): void {
    test('value head: values and gradients', async () => {
      await using engine = await open('float32', true, 'value');
      const tensors = await readGoldenTensors(directory);
      const { head: name } = checkpointNames(engine.shape);
      await engine.writeTensor(`${name}.weight`, Float32Array.from(tensors.get(head.weight)!));
      await engine.writeTensor(`${name}.bias`, Float32Array.from(tensors.get(head.bias)!));
      await engine.publish();
      const { values } = await engine.forward(pack(sequences), { outputs: ['values'], keep: true });
      for (const [b, row] of split(values!, sequences).entries())
        expectWithin(row, head.values[b]!, tolerance.hidden, `sequence ${b}`);
      const gradient = joined(sequences, head.value_weights);
      expectWithin([gradient.reduce((sum, w, i) => sum + w * values![i]!, 0)], [head.loss], tolerance.losses, 'loss');
      await engine.backward({ values: gradient });
      const rename = (key: string) => key.replace(/^value_head\./, `${name}.`);
      await compareGradients(engine, tensors, head.grad_prefix, head.grad_norm, rename);
    });
  }

  function rewardModelTests(): void {
    test.each<[Dtype, number]>([
      ['float32', tokens32],
      ['bfloat16', tokens16],
    ])('scores in %s', async (dtype, bound) => {
      await using engine = await open(dtype);
      const actual = await rows(engine, sequences, 'values');
      for (const [b, { tokens, position_scores, score }] of golden.sequences.entries()) {
        expectWithin(actual[b]!, position_scores, bound, `sequence ${b}`);
        expectWithin([actual[b]![scorePosition(tokens, engine.shape.padToken)]!], [score], bound, `score ${b}`);
      }
    });

    const { padding = [] } = golden;
    test.each(padding)('padding: $name', async ({ tokens, read_position, score, position_scores }) => {
      await using engine = await open('float32');
      const [actual] = await rows(engine, [tokens], 'values');
      expectWithin(actual!, position_scores, tokens32, 'positions');
      expect(scorePosition(tokens, engine.shape.padToken)).toBe(read_position);
      expectWithin([actual![read_position]!], [score], tokens32, 'score');
    });

    const pairs = golden.pairs ?? [];
    const sides = pairs.flatMap(({ chosen, rejected }) => [chosen, rejected]);

    /** mean of -log sigmoid(chosen - rejected - margin), and its gradient when learning. */
    async function bradleyTerry(engine: Engine, margin: boolean, learn: boolean) {
      const { values } = await engine.forward(pack(sides), { outputs: ['values'], keep: learn });
      const positions = sides.map((tokens) => scorePosition(tokens, engine.shape.padToken));
      const scores = split(values!, sides).map((row, i) => row[positions[i]!]!);
      const gradients = sides.map((tokens) => new Array<number>(tokens.length).fill(0));
      let loss = 0;
      for (const [i, pair] of pairs.entries()) {
        const difference = scores[2 * i]! - scores[2 * i + 1]! - (margin ? pair.margin : 0);
        loss += Math.log1p(Math.exp(-difference)) / pairs.length;
        const slope = 1 / (1 + Math.exp(difference)) / pairs.length;
        gradients[2 * i]![positions[2 * i]!] = -slope;
        gradients[2 * i + 1]![positions[2 * i + 1]!] = slope;
      }
      if (learn) await engine.backward({ values: joined(sides, gradients) });
      return { loss, scores };
    }

    const losses: [string, boolean, PreferenceLoss | undefined][] = [
      ['without margins', false, golden.bradley_terry],
      ['with margins', true, golden.bradley_terry_margin],
    ];
    for (const [name, margin, expected] of losses) {
      if (!expected) continue;
      test(`Bradley-Terry ${name}: scores, loss and gradients`, async () => {
        await using engine = await open('float32', true);
        const { loss, scores } = await bradleyTerry(engine, margin, true);
        const interleaved = pairs.flatMap((_, i) => [expected.chosen_scores[i]!, expected.rejected_scores[i]!]);
        expectWithin(scores, interleaved, tokens32, 'scores');
        expectWithin([loss], [expected.loss], tolerance.losses, 'loss');
        await compareGradients(engine, await readGoldenTensors(directory), expected.grad_prefix, expected.grad_norm);
      });
    }

    const trajectory = golden.bradley_terry_trajectory;
    if (trajectory) {
      test('the AdamW trajectory of Bradley-Terry', async () => {
        await using engine = await open('float32', true);
        await compareTrajectory(engine, await readGoldenTensors(directory), trajectory, async (learn) => {
          return (await bradleyTerry(engine, trajectory.margin, learn)).loss;
        });
      });
    }
  }
});
