/**
 * A score is a function of the reward model's weights and the sequence, to the last bit: whatever else is in the batch, however it
 * is cut or padded, over whatever ranks, in the trainer's evaluation and in the rollout, before and after a checkpoint. So the
 * accuracy that training reports is the one that a rollout's scorer has.
 */
import { mkdtemp, readFile, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { type Pair, rewardBatch } from '../../src/algorithms/reward-model.js';
import { saveModel } from '../../src/checkpoints/hugging-face.js';
import { createDevice, createEngine, createParallelEngine } from '../../src/checkpoints/load-model.js';
import { packBatch } from '../../src/data/batch.js';
import type { Engine } from '../../src/engine/engine.js';
import { score } from '../../src/inference/score.js';
import { withHead } from '../../src/layout/config.js';
import { bradleyTerry } from '../../src/losses/reward-model.js';
import { train } from '../../src/train/train.js';
import { RewardWorker } from '../../src/workers/reward.js';
import { dtypes, random, randomModel, sequencesOf, smallShape, withEngine, writeCheckpoint } from './support.js';

const padToken = 0;
const shape = { ...withHead(smallShape, 'score'), padToken, maxPositions: 256 };
const model = randomModel('reward', shape, 5);
const parts = 4;
const lengths = [40, 3, 65, 1, 17, 64, 90, 8];
const sequences = sequencesOf(shape, lengths).map((tokens) => tokens.map((token) => Math.max(1, token)));

let directory: string;
beforeAll(async () => {
  directory = await writeCheckpoint(model, join(await mkdtemp(join(tmpdir(), 'lockstep-alignment-')), 'reward'));
});

/** As a rollout scores. */
async function scoresOf(engine: Engine, rows: readonly Int32Array[], microTokens = 4096): Promise<number[]> {
  const { scores } = await RewardWorker.create(engine, { microTokens }).computeRewards(packBatch(rows));
  return [...scores];
}

const padded = (tokens: Int32Array, count: number): Int32Array =>
  Int32Array.from([...tokens, ...new Array(count).fill(0)]);

const settings = {
  ...{ microTokens: 96, seed: 1, learningRate: () => 0 },
  optimizer: { betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0, clipNorm: 1 } as const,
};

describe.each(dtypes)('a score in %s is the same', (dtype) => {
  const onOne = <T>(run: (engine: Engine, alone: number[]) => Promise<T>, trained = false) =>
    withEngine(model, { dtype, parts, train: trained }, async (engine) => {
      const alone: number[] = [];
      for (const sequence of sequences) alone.push(...(await scoresOf(engine, [sequence])));
      expect(new Set(alone).size).toBe(sequences.length);
      return run(engine, alone);
    });

  test('alone and in any batch, in any order and at any micro-batch size', () =>
    onOne(async (engine, alone) => {
      const order = sequences.map((_, i) => (i * 5 + 3) % sequences.length);
      const shuffled = order.map((i) => sequences[i]!);
      for (const microTokens of [1, 64, 100, 4096]) {
        expect(await scoresOf(engine, sequences, microTokens)).toEqual(alone);
        expect(await scoresOf(engine, shuffled, microTokens)).toEqual(order.map((i) => alone[i]));
      }
    }));

  test('with any padding behind', () =>
    onOne(async (engine, alone) => {
      const next = random(2);
      for (let attempt = 0; attempt < 5; attempt++) {
        const rows = sequences.map((tokens) => padded(tokens, Math.floor(next() * 70)));
        expect(await scoresOf(engine, rows, 128)).toEqual(alone);
      }
    }));

  test('at tensor 1, 2, 4 and pipeline 1, 2', () =>
    onOne(async (_, alone) => {
      for (const [tensor, pipeline] of [
        [1, 2],
        [2, 1],
        [2, 2],
        [4, 1],
        [4, 2],
      ] as const) {
        const devices = Array.from({ length: tensor * pipeline }, () => createDevice({ threads: 1 }));
        try {
          const degrees = { tensor, pipeline };
          const engine = await createParallelEngine({
            model: directory,
            devices,
            degrees,
            dtype,
            parts,
            head: 'score',
          });
          expect([tensor, pipeline, ...(await scoresOf(engine, sequences, 100))]).toEqual([tensor, pipeline, ...alone]);
        } finally {
          for (const device of devices) await device.close();
        }
      }
    }));

  test('in the evaluation and in the training of the reward model', () =>
    onOne(async (engine, alone) => {
      const worker = RewardWorker.createLearner(engine, settings);
      const pairs = sequences.slice(1).map((chosen, i): Pair => ({ chosen, rejected: sequences[i]!, margin: 0 }));
      for (const [i, pair] of pairs.entries()) {
        const margin = alone[i + 1]! - alone[i]!;
        const { statistics } = await worker.computeLoss(rewardBatch([pair]), bradleyTerry());
        expect(statistics.margin).toBe(margin);
        const update = { epochs: 1, miniBatches: 1, iteration: 1 };
        const learned = await worker.update(rewardBatch([pair]), bradleyTerry(), update);
        expect(learned.statistics.margin).toBe(margin);
      }
      const won = pairs.filter((_, i) => alone[i + 1]! > alone[i]!).length;
      const { statistics } = await worker.computeLoss(rewardBatch(pairs), bradleyTerry());
      expect(statistics.accuracy).toBeCloseTo(won / pairs.length, 12);
    }, true));

  test('after save and load, and by score()', () =>
    onOne(async (engine, alone) => {
      const saved = join(directory, '..', `saved-${dtype}`);
      const configJson = JSON.parse(await readFile(join(directory, 'config.json'), 'utf8'));
      await saveModel(engine, saved, { configJson });
      await withEngine(
        { ...model, open: (options) => createEngine({ model: saved, head: 'score', ...options }) },
        { dtype, parts },
        async (loaded) => expect(await scoresOf(loaded, sequences)).toEqual(alone),
      );
      const rows = sequences.map((tokens) => ({ tokens: [...tokens] }));
      const scored: number[] = [];
      for await (const row of score({ model: saved, dtype, parts, threads: 2 }, rows)) scored.push(row.score!);
      expect(scored).toEqual(alone);
    }));
});

describe('held-out accuracy at the end of training', () => {
  const pairs = Array.from({ length: 32 }, (_, i) => {
    const [prompt, chosen, rejected] = sequencesOf(shape, [6 + (i % 5), 9, 7 + (i % 9)], i + 1).map((tokens) =>
      [...tokens].map((token) => Math.max(1, token)),
    );
    return { prompt, chosen, rejected };
  });

  test.each(dtypes)('is that of the scorer of a rollout, exactly, %s', async (dtype) => {
    const folder = await mkdtemp(join(tmpdir(), 'lockstep-alignment-'));
    const file = join(folder, 'pairs.jsonl');
    await writeFile(file, pairs.map((row) => JSON.stringify(row)).join('\n'));
    const output = join(folder, 'run');
    let accuracy: number | undefined;
    let checkpoint = '';
    const config = {
      ...{ algorithm: 'reward' as const, model: directory, data: { train: file, eval: file }, dtype, output },
      ...{ batch: { sequences: 8, microTokens: 64 }, optimizer: { learningRate: 1e-3 }, steps: 3, threads: 2 },
      ...{ numerics: { parts }, evaluation: { rows: 32 } },
    };
    for await (const event of train(config)) {
      if (event.type === 'evaluation') accuracy = event.metrics['eval.reward.accuracy'];
      if (event.type === 'done') checkpoint = event.checkpoint;
    }
    const device = createDevice({ threads: 2 });
    try {
      const engine = await createEngine({ model: checkpoint, device, dtype, head: 'score', parts });
      const rows = pairs.flatMap(({ prompt, chosen, rejected }) =>
        [chosen!, rejected!].map((answer) => Int32Array.from([...prompt!, ...answer])),
      );
      const scores = await scoresOf(engine, rows.reverse(), 200);
      scores.reverse();
      const won = pairs.filter((_, i) => scores[2 * i]! > scores[2 * i + 1]!).length;
      expect(won).toBeGreaterThan(0);
      expect(won / pairs.length).toBe(accuracy);
    } finally {
      await device.close();
    }
  });
});
