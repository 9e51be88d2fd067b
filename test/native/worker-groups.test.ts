/**
 * Workers over replicas, each over the engine of one rank, called through a worker group by the protocols that they carry: every number
 * has the bits that one worker gives, for batches of any rows, also where a replica gets none.
 */
import { describe, expect, test } from 'vitest';
import { WorkerGroup } from '../../src/cluster/worker-group.js';
import { packBatch, type TokenBatch } from '../../src/data/batch.js';
import type { Engine } from '../../src/engine/engine.js';
import { withHead } from '../../src/layout/config.js';
import { type ActorSettings, ActorWorker } from '../../src/workers/actor.js';
import { CostWorker } from '../../src/workers/cost.js';
import { CriticWorker } from '../../src/workers/critic.js';
import type { LearnerSettings } from '../../src/workers/learner.js';
import { ReferenceWorker } from '../../src/workers/reference.js';
import { RewardWorker } from '../../src/workers/reward.js';
import { unpackBatch } from '../unpack-batch.js';
import { dtypes, randomModel, sameBits, sequencesOf, type TestModel, tinyShape, withEngine } from './support.js';

const replicas = { pipeline: 1, tensor: 1, data: 2 };
const model = (head: 'language' | 'value' | 'score') => randomModel(head, withHead(tinyShape, head), 3);

/** Ragged batches of even, uneven and too few rows. */
const batches: TokenBatch[] = [[9, 3, 30, 1], [5, 64, 2], [1, 1, 70, 12, 8, 8, 33], [17]].map((lengths, i) =>
  packBatch(sequencesOf(tinyShape, lengths, i + 1)),
);

/** Replicas cut micro-batches of their own, so sequences meet others in them. */
const [alone, beside] = [{ microTokens: 4096 }, { microTokens: 40, temperature: 1 }];

const settings: LearnerSettings = {
  ...{ microTokens: 64, seed: 0, learningRate: () => 0 },
  optimizer: { betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0, clipNorm: 1 },
};

const sampling: ActorSettings = {
  ...{ ...settings, mismatch: 'first' },
  sampling: { maxNewTokens: 12, temperature: 1, topP: 1, topK: 0, stopTokens: [7], seed: 5 },
};

/** Runs with one engine and with that of each replica. */
function withReplicas(
  { dtype, of }: { dtype: (typeof dtypes)[number]; of: TestModel },
  run: (one: Engine, each: readonly Engine[]) => Promise<void>,
): Promise<void> {
  const open = <T>(then: (engine: Engine) => Promise<T>) => withEngine(of, { dtype, threads: 1 }, then);
  return open((one) => open((first) => open((second) => run(one, [first, second]))));
}

describe.each(dtypes)('a worker group over two replicas in %s', (dtype) => {
  test("gives the actor's responses, to the same prompt too, and its log-probs", () =>
    withReplicas({ dtype, of: model('language') }, async (one, each) => {
      const worker = ActorWorker.create(one, { ...sampling, ...alone });
      const group = WorkerGroup.create({
        ...{ name: 'actor', layout: replicas, generation: { pipeline: 1, tensor: 1 } },
        worker: each.map((engine) => ActorWorker.create(engine, { ...sampling, ...beside })),
        protocols: ActorWorker.protocols,
      });
      for (const lengths of [[5, 5, 5, 5], [9, 3, 30], [17]]) {
        const [question] = sequencesOf(tinyShape, [40]);
        const prompts = lengths.map((length) => ({ tokens: question!.subarray(0, length), row: { length } }));
        const expected = await worker.generateSequences(prompts, { iteration: 2, round: 1 });
        const rollout = await group.generateSequences(prompts, { iteration: 2, round: 1 });
        expect(rollout).toEqual(expected);
        sameBits(rollout.logprobs, expected.logprobs, 'log-probs of responses');
        sameBits(await group.computeLogprobs(rollout), await worker.computeLogprobs(expected), 'logprobs');
        const texts = unpackBatch(rollout).map(String);
        expect(new Set(texts).size).toBe(texts.length);
      }
    }));

  test("gives the reference's log-probs", () =>
    withReplicas({ dtype, of: model('language') }, async (one, each) => {
      const worker = ReferenceWorker.create(one, alone);
      const group = WorkerGroup.create({
        name: 'reference',
        layout: replicas,
        worker: each.map((engine) => ReferenceWorker.create(engine, beside)),
        protocols: ReferenceWorker.protocols,
      });
      for (const batch of batches) {
        sameBits(await group.computeLogprobs(batch), await worker.computeLogprobs(batch), 'logprobs');
      }
    }));

  test("gives the critic's values", () =>
    withReplicas({ dtype, of: model('value') }, async (one, each) => {
      const worker = CriticWorker.create(one, { ...settings, ...alone });
      const group = WorkerGroup.create({
        name: 'critic',
        layout: replicas,
        worker: each.map((engine) => CriticWorker.create(engine, { ...settings, ...beside })),
        protocols: CriticWorker.protocols,
      });
      for (const batch of batches) {
        sameBits(await group.computeValues(batch), await worker.computeValues(batch), 'values');
      }
    }));

  test('gives the scores of a reward model and the costs of a cost model', () =>
    withReplicas({ dtype, of: model('score') }, async (one, each) => {
      const worker = RewardWorker.create(one, alone);
      const layout = { layout: replicas };
      const reward = WorkerGroup.create({
        ...{ name: 'reward', ...layout },
        worker: each.map((engine) => RewardWorker.create(engine, beside)),
        protocols: RewardWorker.protocols,
      });
      const cost = WorkerGroup.create({
        ...{ name: 'cost', ...layout },
        worker: each.map((engine) => CostWorker.create(engine, beside)),
        protocols: CostWorker.protocols,
      });
      for (const batch of batches) {
        const { scores } = await worker.computeRewards(batch);
        expect(scores).toHaveLength(batch.lengths.length);
        sameBits((await reward.computeRewards(batch)).scores, scores, 'scores');
        sameBits((await cost.computeCosts(batch)).scores, scores, 'costs');
      }
    }));
});
