/** PPO, SFT and reward modelling over tables in place of models: hand numbers and the laws of a first epoch. */
import { describe, expect, it } from 'vitest';
import type { Prompt, Rewards, Rollout } from '../../src/algorithms/algorithm.js';
import { rolloutMetrics } from '../../src/algorithms/metrics.js';
import { makeExperience, type PpoSettings, ppo } from '../../src/algorithms/ppo.js';
import { rewardBatch, rewardModel } from '../../src/algorithms/reward-model.js';
import { learnedMask, placeScores } from '../../src/algorithms/rollout.js';
import { evaluateSft, sft, sftBatch } from '../../src/algorithms/sft.js';
import { categorical } from '../categorical.js';
import { answerLength, countOf, Table, TableActor, vocabulary } from './table-models.js';

const settings: PpoSettings = {
  epochs: 1,
  miniBatches: 1,
  clip: 0.2,
  valueClip: 0.2,
  gamma: 1,
  lambda: 1,
  klCoefficient: 0.1,
  kl: { in: 'reward', estimator: 'k1', controller: 'fixed', target: 6, horizon: 100 },
  whiten: false,
  entropyCoefficient: 0,
  truncation: 'keep',
  truncationPenalty: 1,
};

const row = {};
const prompt = (...tokens: number[]): Prompt => ({ tokens: Int32Array.from(tokens), row });

/** Two answers: tokens [7 | 1 2 3] that stopped and [8 9 | 4 5] that was cut. */
const rollout: Rollout = {
  prompts: [prompt(7), prompt(8, 9)],
  tokens: Int32Array.of(7, 1, 2, 3, 8, 9, 4, 5),
  lengths: Int32Array.of(4, 4),
  promptLengths: Int32Array.of(1, 2),
  responseMask: Uint8Array.of(1, 1, 1, 0, 0, 1, 1, 0),
  logprobs: Float32Array.of(-1, -2, -3, 0, 0, -1, -1, 0),
  finish: ['stop', 'length'],
};
const rewards: Rewards = { scores: Float64Array.of(2, 5) };
const anchor = Float32Array.of(-3, -3, -3, 9, 9, -1, -2, 9);
const values = Float32Array.of(0.5, 0.25, 0, 9, 9, 1, 2, 9);
const close = (actual: ArrayLike<number>, expected: number[]) => {
  expect(Array.from(actual, (x) => Math.round(x * 1e6) / 1e6)).toEqual(expected);
};

describe('the experience of PPO', () => {
  it('has the advantages and returns of a calculation by hand', () => {
    const { experience, penalty } = makeExperience(rollout, values, anchor, rewards, settings, 0.1);
    // d = 2, 1, 0 and 0, 1; rewards −0.2, −0.1, 2 and 0, 4.9; with γ = λ = 1 returns are sums to the end.
    close(penalty.rewards, [-0.2, -0.1, 2, 0, 0, 0, 4.9, 0]);
    close(experience.columns.returns!, [1.7, 1.9, 2, 0, 0, 4.9, 4.9, 0]);
    close(experience.columns.advantages!, [1.2, 1.65, 2, 0, 0, 3.9, 2.9, 0]);
    expect([penalty.mean, penalty.perSequence]).toEqual([0.75, 2]);
    expect(experience.mask).toEqual(rollout.responseMask);
  });

  it('whitens over the whole rollout, once', () => {
    const { experience } = makeExperience(rollout, values, anchor, rewards, { ...settings, whiten: true }, 0.1);
    const whitened = Array.from(experience.columns.advantages!).filter((_, t) => experience.mask[t]);
    expect(whitened.reduce((sum, x) => sum + x, 0)).toBeCloseTo(0, 12);
    expect(whitened.reduce((sum, x) => sum + x * x, 0) / 4).toBeCloseTo(1, 7);
  });

  it('leaves the rewards alone when KL is a term of the loss', () => {
    const kl = { ...settings.kl, in: 'loss', estimator: 'k3' } as const;
    const { penalty } = makeExperience(rollout, values, anchor, rewards, { ...settings, kl }, 0.1);
    close(penalty.rewards, [0, 0, 2, 0, 0, 0, 5, 0]);
    expect(penalty.mean).toBeGreaterThan(0);
  });
});

describe('truncated answers', () => {
  const masked = { ...settings, truncation: 'mask' } as const;
  const penalised = { ...settings, truncation: 'penalise', truncationPenalty: 3 } as const;

  it('are kept, masked or penalised, and counted each time', () => {
    expect(learnedMask(rollout, settings)).toEqual(rollout.responseMask);
    expect([...learnedMask(rollout, masked)]).toEqual([1, 1, 1, 0, 0, 0, 0, 0]);
    expect([...placeScores(rollout, rewards, penalised)]).toEqual([0, 0, 2, 0, 0, 0, 2, 0]);
    for (const policy of [settings, masked, penalised]) {
      expect(rolloutMetrics(rollout, rewards, policy)['response.truncated']).toBe(0.5);
    }
    expect(rolloutMetrics(rollout, rewards, settings)['reward.mean']).toBe(3.5);
    expect(rolloutMetrics(rollout, rewards, masked)['reward.mean']).toBe(2);
    expect(rolloutMetrics(rollout, rewards, penalised)).toMatchObject({ 'reward.mean': 2, 'reward.model': 3.5 });
  });

  it('leave numbers finite when all of them are masked', () => {
    const cut: Rollout = { ...rollout, finish: ['length', 'length'] };
    const { experience, penalty } = makeExperience(cut, values, anchor, rewards, { ...masked, whiten: true }, 0.1);
    expect(Array.from(experience.columns.advantages!)).toEqual(Array(8).fill(0));
    expect(penalty.mean).toBe(0);
    expect(rolloutMetrics(cut, rewards, masked)).not.toHaveProperty(['reward.mean']);
    expect(rolloutMetrics(cut, rewards, masked)['reward.model']).toBe(3.5);
  });
});

describe('where rewards lie', () => {
  it('an empty answer has no place for its score and disturbs nothing', () => {
    const empty: Rollout = {
      ...rollout,
      tokens: Int32Array.of(7, 8, 9, 4),
      lengths: Int32Array.of(1, 3),
      responseMask: Uint8Array.of(0, 0, 1, 0),
      logprobs: new Float32Array(4),
    };
    expect([...placeScores(empty, rewards, settings)]).toEqual([0, 0, 5, 0]);
    expect(rolloutMetrics(empty, rewards, settings)).toMatchObject({ 'response.length': 0.5, 'response.empty': 0.5 });
    const zeros = new Float32Array(4);
    const { experience } = makeExperience(empty, zeros, zeros, rewards, { ...settings, whiten: true }, 0.1);
    expect(Array.from(experience.columns.advantages!).every(Number.isFinite)).toBe(true);
  });

  it('token rewards stay where they are; one on a token that was not sampled is refused', () => {
    const tokens = Float64Array.of(0.5, 0, 1, 0, 0, 0, -1, 0);
    expect([...placeScores(rollout, { ...rewards, tokens }, settings)]).toEqual([...tokens]);
    tokens[4] = 1;
    expect(() => placeScores(rollout, { ...rewards, tokens }, settings)).toThrow(/position 4.*no sampled token/);
  });
});

describe('an iteration of PPO', () => {
  const prompts = Array.from({ length: 64 }, () => prompt(0));
  const reward = countOf(3);
  const play = (options: Partial<PpoSettings> = {}) => {
    const actor = new TableActor(2);
    const critic = new Table(2);
    const models = { actor, critic, reference: new TableActor(0), reward };
    return { actor, critic, models, algorithm: ppo({ ...settings, whiten: true, ...options }) };
  };

  it('starts its first epoch at ratio 1: nothing clipped, KL 0, a loss of whitened advantages that is 0', async () => {
    const { actor, models, algorithm } = play({ epochs: 3 });
    const { metrics } = await algorithm.iterate(models, prompts, { iteration: 1 });
    expect(actor.log[0]).toMatchObject({ clipFraction: 0, outsideFraction: 0, kl: 0, outliers: 0 });
    expect(metrics).toMatchObject({ 'policy.clipFraction': 0, 'policy.kl': 0, 'kl.mean': 0 });
    expect(Math.abs(metrics['policy.loss']!)).toBeLessThan(1e-8);
    expect(actor.log[2]!.kl).toBeGreaterThan(0);
  });

  it('raises the probability of what is rewarded, and the critic learns the mean return', async () => {
    const { actor, critic, models, algorithm } = play({ epochs: 2, valueClip: 10, klCoefficient: 0 });
    const before = categorical(actor.logits[0]!).logprobs[3]!;
    const losses: number[] = [];
    for (let iteration = 1; iteration <= 10; iteration++) {
      const { metrics } = await algorithm.iterate(models, prompts, { iteration });
      losses.push(metrics['value.loss']!);
    }
    expect(categorical(actor.logits[0]!).logprobs[3]!).toBeGreaterThan(before + 0.5);
    expect(losses.at(-1)).toBeLessThan(0.8 * losses[0]!);
    // Answers average 0.75 tokens 3, and the value knows nothing but the position.
    for (const value of critic.values.slice(0, answerLength)) expect(value).toBeCloseTo(0.75, 2);
  });

  it('clips above at a bound of its own, and bounds what an unwanted token costs', async () => {
    const second = async (options: Partial<PpoSettings>) => {
      const { actor, models, algorithm } = play({ epochs: 2, clip: 0.001, ...options });
      await algorithm.iterate(models, prompts, { iteration: 1 });
      return actor.log[1]!;
    };
    const [plain, higher, dual] = [await second({}), await second({ clipHigh: 10 }), await second({ dualClip: 0.5 })];
    expect(plain.clipFraction).toBeGreaterThan(higher.clipFraction!);
    expect(higher.loss).toBeLessThan(plain.loss!);
    expect(dual.loss).toBeLessThan(plain.loss!);
  });

  it('reports every metric of the contract as a finite number', async () => {
    const { models, algorithm } = play();
    const { metrics } = await algorithm.iterate(models, prompts, { iteration: 1 });
    const names = ['loss', 'reward.mean', 'reward.model', 'kl.mean', 'value.loss', 'value.explained', 'policy.loss'];
    names.push('policy.clipFraction', 'policy.kl', 'entropy', 'response.length', 'response.truncated', 'gradient.norm');
    for (const name of names) expect(Number.isFinite(metrics[name]), name).toBe(true);
    expect(metrics).toMatchObject({
      'reward.mean': 0.75,
      'response.length': 3,
      entropy: expect.closeTo(Math.log(4), 6),
    });
  });

  it('steers an adaptive coefficient by nats per answer and continues it from its state', async () => {
    const kl = { ...settings.kl, controller: 'adaptive', target: 1, horizon: 640 } as const;
    const { models, algorithm } = play({ kl });
    await algorithm.iterate(models, prompts, { iteration: 1 });
    // The first KL is 0: error −0.2, 64 answers of a horizon of 640.
    expect(algorithm.state()).toEqual({ klCoefficient: 0.1 * (1 - 0.02) });
    const resumed = ppo({ ...settings, kl });
    resumed.restore(JSON.parse(JSON.stringify(algorithm.state())));
    expect(resumed.state()).toEqual(algorithm.state());
    expect(() => resumed.restore({})).toThrow(/finite number/);
  });

  it('measures KL against the reference once the policy has moved, also as a term of the loss', async () => {
    const { models, algorithm, actor } = play({
      kl: { ...settings.kl, in: 'loss', estimator: 'k2' },
      klCoefficient: 50,
    });
    const still = play({ klCoefficient: 0 });
    for (let iteration = 1; iteration <= 4; iteration++) {
      await algorithm.iterate(models, prompts, { iteration });
      await still.algorithm.iterate(still.models, prompts, { iteration });
    }
    const { metrics } = await still.algorithm.iterate(still.models, prompts, { iteration: 5 });
    expect(metrics['kl.mean']).not.toBe(0);
    expect(actor.logits).not.toEqual(still.actor.logits);
  });
});

describe('supervised fine-tuning', () => {
  const examples = [
    { tokens: Int32Array.of(0, 1, 2, 3), mask: [1, 0, 1, 1] },
    { tokens: Int32Array.of(0, 2), mask: [0, 1] },
  ];

  it('learns a target at the position that predicts it, never the first token', () => {
    expect([...(sftBatch(examples).mask as Uint8Array)]).toEqual([0, 1, 1, 0, 1, 0]);
  });

  it('starts at the entropy of the uniform distribution and goes down', async () => {
    const actor = new Table(1);
    const batch = sftBatch(examples);
    const { metrics } = await sft().iterate({ actor }, batch, { iteration: 1 });
    expect(metrics.loss).toBeCloseTo(Math.log(vocabulary), 6);
    expect((await evaluateSft({ actor }, batch)).loss).toBeLessThan(metrics.loss!);
  });
});

describe('reward modelling', () => {
  const pair = { chosen: Int32Array.of(0, 1, 2), rejected: Int32Array.of(0, 1), margin: 0.5 };

  it('reads the score at the last token of each answer and the margin with the chosen one', () => {
    const { mask, columns, lengths } = rewardBatch([pair, { ...pair, margin: 0.25 }]);
    expect([...lengths]).toEqual([3, 2, 3, 2]);
    expect([...(mask as Uint8Array)]).toEqual([0, 0, 1, 0, 1, 0, 0, 1, 0, 1]);
    expect([...(columns.margins as Float64Array)]).toEqual([0, 0, 0.5, 0, 0, 0, 0, 0.25, 0, 0]);
  });

  it('learns which answer is chosen', async () => {
    const reward = new Table(1);
    const batch = rewardBatch([pair]);
    const algorithm = rewardModel();
    const { metrics } = await algorithm.iterate({ reward }, batch, { iteration: 1 });
    expect(metrics).toMatchObject({ 'reward.accuracy': 0, 'reward.margin': 0 });
    expect(metrics.loss).toBeCloseTo(Math.log(1 + Math.exp(0.5)), 6);
    const { loss, statistics } = await algorithm.evaluate({ reward }, batch);
    expect(loss).toBeLessThan(metrics.loss!);
    expect(statistics.accuracy).toBe(1);
  });
});
