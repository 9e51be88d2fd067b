/**
 * Log-probs, entropies and gradients of every model shape of the fixtures, bit for bit (DESIGN §2): whatever else is in the
 * batch, for any number of threads, instruction set, implementation, and with recomputation.
 */
import { describe, expect, test } from 'vitest';
import { microBatches, packBatch } from '../../src/data/batch.js';
import type { DeviceOptions } from '../../src/engine/device.js';
import type { Dtype, Engine } from '../../src/engine/engine.js';
import {
  dtypes,
  fillWithNaN,
  fixtureModels,
  instructionSets,
  joined,
  random,
  readAll,
  type Scores,
  sameScores,
  sameTensors,
  scoreAlone,
  scoreTogether,
  sequencesOf,
  type TestModel,
  withEngine,
} from './support.js';

const models = await fixtureModels();
const lengths = [17, 1, 2, 64, 3, 33, 16, 65, 7, 100, 31, 128, 5, 63];
/** Shorter than `lengths`: plain loops are slow. */
const gradientLengths = [9, 1, 34, 2, 17, 70];

const machines: (DeviceOptions & { isa?: string })[] = [
  { threads: 1 },
  { threads: 3 },
  ...instructionSets().map((isa) => ({ isa })),
  { implementation: 'reference', threads: 1 },
];
const cases = models.flatMap((model) => dtypes.map((dtype) => ({ name: `${model.name} ${dtype}`, model, dtype })));

test('the fixtures hold language models', () => {
  expect(models.length).toBeGreaterThan(0);
});

async function packings(engine: Engine, sequences: readonly Int32Array[], alone: readonly Scores[]): Promise<void> {
  sameScores(await scoreTogether(engine, sequences), alone, 'one batch');
  const reversed = await scoreTogether(engine, sequences.toReversed());
  sameScores(reversed.toReversed(), alone, 'the batch reversed');
  for (const microTokens of [64, 150]) {
    const parts: Scores[] = [];
    for (const { begin, end } of microBatches(
      sequences.map(({ length }) => length),
      microTokens,
    )) {
      parts.push(...(await scoreTogether(engine, sequences.slice(begin, end))));
    }
    sameScores(parts, alone, `micro-batches of ${microTokens} tokens`);
  }
}

describe.each(cases)('log-probs and entropies of $name', ({ model, dtype }) => {
  const sequences = sequencesOf(model.shape, lengths);
  let alone: Promise<Scores[]> | undefined;
  const baseline = () => {
    alone ??= withEngine(model, { dtype }, (engine) => scoreAlone(engine, sequences));
    return alone;
  };

  test('do not depend on the rest of the batch', () =>
    withEngine(model, { dtype }, async (engine) => packings(engine, sequences, await baseline())));

  test('do not depend on what lay in the workspace', () =>
    withEngine(model, { dtype, poison: true }, async (engine) => {
      for (const [i, sequence] of sequences.entries()) {
        const filled = await fillWithNaN(engine);
        sameScores(await scoreTogether(engine, [sequence]), [(await baseline())[i]!], `sequence ${i}`);
        expect(engine.memory().workspace!.planned).toBe(filled);
      }
    }));

  test('do not depend on threads, instruction sets and implementation', async () => {
    for (const machine of machines) {
      await withEngine(model, { dtype, ...machine }, async (engine) =>
        sameScores(await scoreTogether(engine, sequences), await baseline(), JSON.stringify(machine)),
      );
    }
  });

  test('are those of the pass that keeps activations', async () => {
    for (const recompute of [false, true]) {
      await withEngine(model, { dtype, train: true, recompute }, async (engine) => {
        const kept = await scoreTogether(engine, sequences, { keep: true });
        sameScores(kept, await baseline(), `keep, recompute ${recompute}`);
      });
    }
  });

  test('depend on the tokens read so far, and on no later one', async () => {
    const whole = sequences.at(-2)!;
    const prefixes = [1, 2, 5, 16, 40, whole.length - 1].filter((n) => n > 0).map((n) => whole.slice(0, n));
    await withEngine(model, { dtype }, async (engine) => {
      const [complete] = await scoreTogether(engine, [whole]);
      const scores = await scoreTogether(engine, prefixes);
      const expected = prefixes.map(({ length }) => ({
        logprobs: Float32Array.from(complete!.logprobs.slice(0, length), (x, t) => (t === length - 1 ? 0 : x)),
        entropies: complete!.entropies.slice(0, length),
      }));
      sameScores(scores, expected, 'prefixes');
    });
  });
});

/** Gradients of all tensors after backward over the given runs of sequences, in order. */
async function gradients(
  model: TestModel,
  options: DeviceOptions & { dtype: Dtype; isa?: string; recompute?: boolean },
  sequences: readonly Int32Array[],
  runs: readonly number[],
): Promise<Map<string, Float32Array>> {
  return withEngine(model, { train: true, ...options }, async (engine) => {
    const next = random(3);
    const draw = (count: number) => Float32Array.from({ length: count }, () => 2 * next() - 1);
    // Drawn sequence by sequence, so that each keeps its own gradient however the batch is cut.
    const drawn = sequences.map(({ length }) => ({ logprobs: draw(length), entropies: draw(length) }));
    const filled = options.poison ? await fillWithNaN(engine) : undefined;
    let at = 0;
    for (const count of runs) {
      await engine.forward(packBatch(sequences.slice(at, at + count)), { outputs: ['logprobs'], keep: true });
      const chosen = drawn.slice(at, at + count);
      await engine.backward({
        logprobs: joined(chosen.map(({ logprobs }) => logprobs)),
        entropies: joined(chosen.map(({ entropies }) => entropies)),
      });
      at += count;
    }
    if (filled !== undefined) expect(engine.memory().workspace!.planned).toBe(filled);
    return readAll(engine, 'gradients');
  });
}

describe.each(cases)('gradients of $name', ({ model, dtype }) => {
  const sequences = sequencesOf(model.shape, gradientLengths);
  const all = [sequences.length];
  let together: Promise<Map<string, Float32Array>> | undefined;
  const baseline = () => {
    together ??= gradients(model, { dtype }, sequences, all);
    return together;
  };

  test('do not depend on the cuts between micro-batches', async () => {
    for (const runs of [sequences.map(() => 1), [2, sequences.length - 2], [sequences.length - 1, 1]]) {
      sameTensors(await gradients(model, { dtype }, sequences, runs), await baseline(), `micro-batches ${runs}`);
    }
  });

  test('do not depend on threads, instruction sets, implementation and recomputation', async () => {
    for (const machine of [...machines, { recompute: true }]) {
      const actual = await gradients(model, { dtype, ...machine }, sequences, all);
      sameTensors(actual, await baseline(), JSON.stringify(machine));
    }
  });

  test('do not depend on what lay in the workspace', async () => {
    for (const recompute of [false, true]) {
      const actual = await gradients(model, { dtype, recompute, poison: true }, sequences, all);
      sameTensors(actual, await baseline(), `NaN in the workspace, recompute ${recompute}`);
    }
  });

  test('are there: no tensor is left without one', async () => {
    for (const [name, gradient] of await baseline()) {
      expect(
        gradient.some((x) => x !== 0),
        name,
      ).toBe(true);
    }
  });
});
