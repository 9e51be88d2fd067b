/** The relatives of PPO over tables in place of models: hand numbers, and that each raises what it is rewarded for. */
import { describe, expect, it } from 'vitest';
import type { Models, Prompt, Rewards, Rollout, RolloutAlgorithm } from '../../src/algorithms/algorithm.js';
import { distillation } from '../../src/algorithms/distillation.js';
import { type GrpoSettings, makeExperience as groupExperience, grpo } from '../../src/algorithms/grpo.js';
import { judgedBatch, kto } from '../../src/algorithms/kto.js';
import { type PpoSettings, ppo } from '../../src/algorithms/ppo.js';
import { preference, preferenceBatch } from '../../src/algorithms/preference.js';
import {
  type ReinforcePlusPlusSettings,
  reinforcePlusPlus,
  makeExperience as whitenedReturns,
} from '../../src/algorithms/reinforce-plus-plus.js';
import { type RemaxSettings, remax, makeExperience as remaxExperience } from '../../src/algorithms/remax.js';
import { rloo } from '../../src/algorithms/rloo.js';
import { joinRows, sumsBySequence } from '../../src/algorithms/rollout.js';
import { type SafeRlhfSettings, safeRlhf } from '../../src/algorithms/safe-rlhf.js';
import { preferenceLosses } from '../../src/losses/preference.js';
import { categorical } from '../categorical.js';
import { countOf, Table, TableActor } from './table-models.js';

const prompt = (...tokens: number[]): Prompt => ({ tokens: Int32Array.from(tokens), row: {} });
const truncation = { truncation: 'keep', truncationPenalty: 1 } as const;
const steps = { epochs: 1, miniBatches: 1 };
const fixed = { controller: 'fixed', target: 6, horizon: 100 } as const;
const close = (actual: ArrayLike<number>, expected: number[]) => {
  expect(Array.from(actual, (x) => Math.round(x * 1e6) / 1e6)).toEqual(expected);
};

/** Two answers to one prompt: [7 | 1 2] and [7 | 3]. */
const rollout: Rollout = {
  prompts: [prompt(7), prompt(7)],
  tokens: Int32Array.of(7, 1, 2, 7, 3),
  lengths: Int32Array.of(3, 2),
  promptLengths: Int32Array.of(1, 1),
  responseMask: Uint8Array.of(1, 1, 0, 1, 0),
  logprobs: Float32Array.of(-1, -2, 0, -1, 0),
  finish: ['stop', 'length'],
};
const anchor = Float32Array.of(-3, -3, 9, -2, 9);
const rewards: Rewards = { scores: Float64Array.of(3, 1) };

const grpoSettings: GrpoSettings = {
  ...{ ...truncation, ...steps, samples: 2, advantage: 'dr-grpo', loss: 'ppo', clip: 0.2 },
  ...{ aggregation: { mode: 'token-mean' }, klCoefficient: 0, kl: { in: 'loss', estimator: 'k3' } },
  ...{ entropyCoefficient: 0, samplingRounds: 1, overlongBuffer: 0, maxNewTokens: 4, ptxCoefficient: 0 },
};
const reinforceSettings: ReinforcePlusPlusSettings = {
  ...{ ...truncation, ...steps, samples: 2, baseline: false, clip: 0.2, gamma: 1, klCoefficient: 0.1 },
  ...{ klEstimator: 'k1', entropyCoefficient: 0 },
};
const remaxSettings: RemaxSettings = {
  ...{ ...truncation, ...steps, samples: 2, gamma: 1, klCoefficient: 0.1, klReturn: 'token' },
};
const safeSettings: SafeRlhfSettings = {
  ...{ ...truncation, ...steps, clip: 0.2, valueClip: 10, gamma: 1, lambda: 1, klCoefficient: 0, rewardBound: 0 },
  ...{ whiten: true, entropyCoefficient: 0, ptxCoefficient: 0 },
  constraint: { initial: 1, learningRate: 0.5, threshold: 0.2, window: 64, maximum: 10 },
};

describe('advantages by hand', () => {
  it('of a group: the same at every token of an answer, from scores with their penalties', () => {
    const at = (settings: Partial<GrpoSettings>) =>
      groupExperience(rollout, anchor, rewards, { ...grpoSettings, ...settings }).experience.columns.advantages!;
    close(at({}), [1, 1, 0, -1, 0]);
    close(at({ truncation: 'penalise', truncationPenalty: 2 }), [2, 2, 0, -2, 0]);
    // d = 2, 1 and 1: scores 3 − 0.3 and 1 − 0.1.
    close(at({ klCoefficient: 0.1, kl: { in: 'reward', estimator: 'k1' } }), [0.9, 0.9, 0, -0.9, 0]);
    // Two tokens of at most 2, the last of which costs 1: the first answer loses it.
    close(at({ maxNewTokens: 2, overlongBuffer: 1 }), [0.5, 0.5, 0, -0.5, 0]);
    close(at({ advantage: 'rloo' }), [2, 2, 0, -2, 0]);
  });

  it('groups of equal scores are counted before KL and length shape them', () => {
    const same = { scores: Float64Array.of(2, 2) };
    const shaped = { ...grpoSettings, klCoefficient: 0.1, kl: { in: 'reward', estimator: 'k1' } } as const;
    expect(groupExperience(rollout, anchor, same, shaped).equal).toBe(1);
    expect(groupExperience(rollout, anchor, rewards, shaped).equal).toBe(0);
  });

  it('of REINFORCE++: returns to the end, whitened by the population; its baseline form starts from the group', () => {
    const at = (settings: Partial<ReinforcePlusPlusSettings>) =>
      whitenedReturns(rollout, anchor, rewards, { ...reinforceSettings, ...settings }).experience.columns.advantages!;
    // Returns 2.7, 2.9 and 0.9.
    const [mean, deviation] = [6.5 / 3, Math.sqrt((2.7 ** 2 + 2.9 ** 2 + 0.9 ** 2) / 3 - (6.5 / 3) ** 2)];
    const returns = [2.7, 2.9, 0.9].map((x) => Math.round(((x - mean) / deviation) * 1e6) / 1e6);
    close(at({}), [returns[0]!, returns[1]!, 0, returns[2]!, 0]);
    // 1, 1 and −1 of mean 1/3.
    const scale = Math.sqrt(1 - 1 / 9);
    const above = Math.round((2 / 3 / scale) * 1e6) / 1e6;
    close(at({ baseline: true }), [above, above, 0, Math.round((-4 / 3 / scale) * 1e6) / 1e6, 0]);
  });

  it('of ReMax: against the greedy answer, a token paying for its own KL or for all that follows', () => {
    const at = (settings: Partial<RemaxSettings>) =>
      remaxExperience(rollout, anchor, rewards, greedy, scored, { ...remaxSettings, ...settings }).experience.columns
        .advantages!;
    const greedy = joinRows([{ rollout, rows: [1] }]);
    const scored = { scores: Float64Array.of(2) };
    close(at({}), [0.8, 0.9, 0, -1.1, 0]);
    close(at({ klReturn: 'to-go' }), [0.7, 0.9, 0, -1.1, 0]);
    // The greedy answer was cut as the second one was: both pay.
    close(at({ truncation: 'penalise' }), [1.8, 1.9, 0, -1.1, 0]);
  });
});

it('rows of rollouts join to a rollout of them', () => {
  const joined = joinRows([
    { rollout, rows: [1] },
    { rollout, rows: [0, 1] },
  ]);
  expect([...joined.tokens]).toEqual([7, 3, 7, 1, 2, 7, 3]);
  expect([...joined.responseMask]).toEqual([1, 0, 1, 1, 0, 1, 0]);
  expect([...joined.logprobs]).toEqual([-1, 0, -1, -2, 0, -1, 0]);
  expect(joined.finish).toEqual(['length', 'stop', 'length']);
  expect([...sumsBySequence(joined, joined.responseMask)]).toEqual([1, 2, 1]);
});

const prompts = Array.from({ length: 64 }, () => prompt(0));

function models(learningRate = 2) {
  const actor = new TableActor(learningRate);
  const [critic, costCritic] = [new Table(0.5), new Table(0.5)];
  const teacher = new TableActor(0);
  for (const row of teacher.logits) row[2] = 3;
  const { computeRewards: computeCosts } = countOf(1);
  return {
    actor,
    critic,
    costCritic,
    reference: new TableActor(0),
    reward: countOf(3),
    cost: { computeCosts },
    teacher,
  };
}

const probabilities = (actor: TableActor, token: number) =>
  actor.logits.map((row) => Math.exp(categorical(row).logprobs[token]!));

describe('the reference belongs to the KL term', () => {
  const ppoSettings: PpoSettings = { ...safeSettings, kl: { in: 'reward', estimator: 'k1', ...fixed } };
  const all: Record<string, (klCoefficient: number) => RolloutAlgorithm> = {
    ppo: (klCoefficient) => ppo({ ...ppoSettings, klCoefficient }),
    remax: (klCoefficient) => remax({ ...remaxSettings, klCoefficient }),
    'safe-rlhf': (klCoefficient) => safeRlhf({ ...safeSettings, klCoefficient }),
    grpo: (klCoefficient) => grpo({ ...grpoSettings, klCoefficient }),
    rloo: (klCoefficient) => rloo({ ...grpoSettings, klCoefficient }),
    'reinforce++': (klCoefficient) => reinforcePlusPlus({ ...reinforceSettings, klCoefficient }),
  };
  it.each(Object.keys(all))('%s without the term has neither it nor its metrics', async (name) => {
    const measured = async (klCoefficient: number) => {
      const algorithm = all[name]!(klCoefficient);
      const table = Object.entries(models()).filter(([role]) => algorithm.models.includes(role as keyof Models));
      const { metrics } = await algorithm.iterate(Object.fromEntries(table) as unknown as Models, prompts, {
        iteration: 1,
      });
      return [algorithm.models.includes('reference'), Object.keys(metrics).some((key) => key.startsWith('kl.'))];
    };
    expect([await measured(0.1), await measured(0)]).toEqual([
      [true, true],
      [false, false],
    ]);
  });
});

describe('an algorithm raises what it is rewarded for', () => {
  const all: Record<string, () => RolloutAlgorithm> = {
    grpo: () => grpo({ ...grpoSettings, samples: 64, advantage: 'grpo', klCoefficient: 0.01 }),
    ...Object.fromEntries(
      (['gspo', 'cispo', 'sapo', 'gmpo', 'reinforce'] as const).map((loss) => [
        loss,
        () => grpo({ ...grpoSettings, samples: 64, loss, aggregation: { mode: 'seq-mean-token-mean' } }),
      ]),
    ),
    rloo: () => rloo({ ...grpoSettings, samples: 64, loss: 'rloo', aggregation: { mode: 'seq-mean-token-mean' } }),
    'reinforce++': () => reinforcePlusPlus({ ...reinforceSettings, klCoefficient: 0 }),
    'reinforce++ with baseline': () =>
      reinforcePlusPlus({ ...reinforceSettings, samples: 64, baseline: true, klEstimator: 'k2' }),
    remax: () => remax({ ...remaxSettings, samples: 64, klCoefficient: 0 }),
    'safe-rlhf': () => safeRlhf(safeSettings),
  };

  it.each(Object.keys(all))('%s', async (name) => {
    const table = models();
    const algorithm = all[name]!();
    const before = probabilities(table.actor, 3);
    for (let iteration = 1; iteration <= 5; iteration++)
      await algorithm.iterate(table as Models, prompts, { iteration });
    const after = probabilities(table.actor, 3);
    for (const [position, p] of after.entries())
      expect(p, `position ${position}`).toBeGreaterThan(before[position]! + 0.02);
  });

  it('distillation raises what its teacher would say', async () => {
    const table = models();
    const algorithm = distillation({ ...truncation, ...steps, clip: 0.2, entropyCoefficient: 0 });
    const first = await algorithm.iterate(table as Models, prompts, { iteration: 1 });
    for (let iteration = 2; iteration <= 5; iteration++)
      await algorithm.iterate(table as Models, prompts, { iteration });
    const last = await algorithm.iterate(table as Models, prompts, { iteration: 6 });
    expect(probabilities(table.actor, 2)[0]).toBeGreaterThan(0.3);
    expect(last.metrics['reward.mean']).toBeGreaterThan(first.metrics['reward.mean']!);
  });
});

describe('the constraint of Safe-RLHF', () => {
  it('lowers what costs, moves its multiplier by the mean cost, and continues from its state', async () => {
    const table = models();
    const algorithm = safeRlhf(safeSettings);
    const before = probabilities(table.actor, 1)[0]!;
    const { metrics } = await algorithm.iterate(table as Models, prompts, { iteration: 1 });
    // Answers average 0.75 tokens 1 over a threshold of 0.2: log λ grows by 0.5 · 0.55.
    expect(metrics['cost.mean']).toBe(0.75);
    expect(metrics['cost.multiplier']).toBeCloseTo(Math.exp(0.5 * 0.55), 12);
    for (let iteration = 2; iteration <= 5; iteration++)
      await algorithm.iterate(table as Models, prompts, { iteration });
    expect(probabilities(table.actor, 1)[0]).toBeLessThan(before - 0.02);
    const resumed = safeRlhf(safeSettings);
    resumed.restore(JSON.parse(JSON.stringify(algorithm.state())));
    expect(resumed.state()).toEqual(algorithm.state());
    expect(() => resumed.restore({})).toThrow(/finite numbers/);
  });
});

describe('ReMax', () => {
  it('asks for one greedy answer per prompt, which serves all its samples', async () => {
    const table = models();
    const asked: { prompts: number; greedy: boolean | undefined }[] = [];
    const actor = new Proxy(table.actor, {
      get: (target, key) =>
        key !== 'generateSequences'
          ? Reflect.get(target, key)
          : async (given: readonly Prompt[], { greedy }: { greedy?: boolean }) => {
              asked.push({ prompts: given.length, greedy });
              return target.generateSequences(given);
            },
    });
    await remax(remaxSettings).iterate({ ...table, actor } as Models, prompts, { iteration: 1 });
    expect(asked).toEqual([
      { prompts: 64, greedy: undefined },
      { prompts: 32, greedy: true },
    ]);
  });
});

describe('dynamic sampling', () => {
  /** Answers to prompt n all score alike when n is even. */
  const reward = {
    computeRewards: async (given: unknown): Promise<Rewards> => {
      const { prompts: asked } = (await given) as Rollout;
      return { scores: Float64Array.from(asked, ({ tokens }, i) => (tokens[0]! % 2 === 0 ? 1 : i % 2)) };
    },
  };
  const settings = { ...grpoSettings, samples: 2, samplingRounds: 3 };
  const numbered = (from: number, count: number) =>
    Array.from({ length: count }, (_, i) => prompt(from + i)).flatMap((each) => [each, each]);

  it('replaces groups of equal scores by answers to other prompts, and says how many it dropped', async () => {
    const asked: number[] = [];
    let next = 4;
    const draw = async (count: number) => {
      asked.push(count);
      next += count;
      return numbered(next - count, count);
    };
    const context = { iteration: 1, draw };
    const result = await grpo(settings).iterate({ ...models(), reward } as Models, numbered(0, 4), context);
    // 1 and 3 of the first four teach; then 5 of 4 and 5; then none of 6.
    expect(asked).toEqual([2, 1]);
    expect(result.rollout!.prompts.map(({ tokens }) => tokens[0])).toEqual([1, 1, 3, 3, 5, 5]);
    expect(result.metrics).toMatchObject({ 'groups.dropped': 4, 'groups.rounds': 3, 'groups.equal': 0 });
  });

  it('replaces groups whose learned answers score the same, whatever masked and empty ones score', async () => {
    const cut = ['length', 'stop'] as const;
    // Of each group the first answer is cut, or has no tokens.
    for (const [truncation, empty] of [
      ['mask', false],
      ['keep', true],
    ] as const) {
      const actor = new TableActor(0);
      const sample = actor.generateSequences.bind(actor);
      actor.generateSequences = async (asked) => {
        const { responseMask, ...answers } = await sample(asked);
        const mask = responseMask.map((learned, t) => (empty && t % 8 < 4 ? 0 : learned));
        return { ...answers, responseMask: mask, finish: answers.finish.map((_, i) => cut[i % 2]!) };
      };
      const draw = async (count: number) => numbered(1, count);
      const algorithm = grpo({ ...settings, truncation });
      const { metrics } = await algorithm.iterate({ ...models(), actor, reward } as Models, numbered(1, 2), {
        ...{ iteration: 1, draw },
      });
      expect(metrics).toMatchObject({ 'groups.dropped': 4, 'groups.rounds': 3 });
    }
  });

  it('learns from the first round when nothing teaches', async () => {
    const same = {
      computeRewards: async (given: unknown) => ({ scores: ((await given) as Rollout).finish.map(() => 1) }),
    };
    const draw = async (count: number) => numbered(0, count);
    const result = await grpo(settings).iterate({ ...models(), reward: same } as unknown as Models, numbered(0, 4), {
      ...{ iteration: 1, draw },
    });
    expect(result.rollout!.lengths).toHaveLength(8);
    expect(result.metrics).toMatchObject({ 'groups.equal': 4, 'groups.rounds': 3 });
  });
});

describe('learning from preferences', () => {
  const example = (tokens: number[], mask: number[]) => ({ tokens: Int32Array.from(tokens), mask });
  const pairs = [{ chosen: example([0, 3, 3, 3], [0, 1, 1, 1]), rejected: example([0, 1, 1, 1], [0, 1, 1, 1]) }];

  it.each(['dpo', 'ipo', 'hinge', 'simpo', 'orpo'] as const)('%s prefers the chosen answer', async (name) => {
    const table = models(0.1);
    const algorithm = preference({ loss: preferenceLosses[name]({ beta: 0.5 }) });
    expect(algorithm.models).toEqual(name === 'simpo' || name === 'orpo' ? ['actor'] : ['actor', 'reference']);
    for (let iteration = 1; iteration <= 40; iteration++)
      await algorithm.iterate(table, preferenceBatch(pairs), { iteration });
    const { metrics } = await algorithm.iterate(table, preferenceBatch(pairs), { iteration: 41 });
    expect(metrics).toMatchObject({ 'reward.accuracy': 1 });
    expect(metrics['reward.margin']).toBeGreaterThan(0);
    expect(probabilities(table.actor, 3)[0]).toBeGreaterThan(probabilities(table.actor, 1)[0]!);
  });

  it('learns the answers, not the prompts', () => {
    const chosen = example([0, 3, 3, 3], [0, 0, 1, 1]);
    const twoTurns = example([0, 1, 2, 2, 1], [0, 1, 0, 0, 1]);
    const { mask, lengths, groupSize } = preferenceBatch([{ chosen, rejected: twoTurns }]);
    expect(groupSize).toBe(2);
    expect([...lengths]).toEqual([4, 5]);
    expect([...(mask as Uint8Array)]).toEqual([0, 1, 1, 0, 1, 0, 0, 1, 0]);
    const { answers, mismatched } = judgedBatch([
      { ...twoTurns, desirable: true },
      { ...chosen, desirable: false },
    ]);
    expect([...(answers.mask as Uint8Array)]).toEqual([1, 0, 0, 1, 0, 0, 1, 1, 0]);
    expect([...mismatched.tokens]).toEqual([0, 3, 3, 0, 3, 1, 2, 2]);
    expect([...(mismatched.mask as Uint8Array)]).toEqual([1, 1, 0, 0, 1, 0, 0, 0]);
  });

  it('KTO pairs a long prompt with a long answer within the longest row', () => {
    const { mismatched } = judgedBatch([
      { ...example([0, 1, 2, 3, 4], [0, 0, 0, 0, 1]), desirable: true },
      { ...example([5, 6, 7, 8], [0, 1, 1, 1]), desirable: false },
    ]);
    expect([...mismatched.lengths]).toEqual([5, 2]);
    expect([...mismatched.tokens]).toEqual([0, 1, 2, 3, 6, 5, 4]);
    expect([...(mismatched.mask as Uint8Array)]).toEqual([0, 0, 0, 1, 0, 1, 0]);
  });

  it('KTO pairs a prompt with an answer to another one, wherever answers to the same lie', () => {
    const answer = (prompt: number, token: number) => ({ ...example([prompt, token], [0, 1]), desirable: true });
    const neighbours = [answer(0, 4), answer(0, 5), answer(1, 6), answer(1, 7)];
    expect([...judgedBatch(neighbours).mismatched.tokens]).toEqual([0, 6, 0, 6, 1, 4, 1, 4]);
    expect([...judgedBatch([answer(0, 4), answer(0, 5)]).mismatched.tokens]).toEqual([0, 5, 0, 4]);
  });

  it('KTO raises desirable answers, lowers others, and pairs each prompt with the next answer', async () => {
    const answers = [
      { ...example([0, 3, 3, 3], [0, 1, 1, 1]), desirable: true },
      { ...example([5, 1, 1, 1], [0, 1, 1, 1]), desirable: false },
    ];
    const { mismatched } = judgedBatch(answers);
    expect([...mismatched.tokens]).toEqual([0, 1, 1, 1, 5, 3, 3, 3]);
    const table = models();
    const algorithm = kto({ beta: 0.5 });
    for (let iteration = 1; iteration <= 5; iteration++)
      await algorithm.iterate(table, judgedBatch(answers), { iteration });
    const { metrics } = await algorithm.iterate(table, judgedBatch(answers), { iteration: 6 });
    expect(metrics['reward.chosen']).toBeGreaterThan(metrics['reward.rejected']!);
    expect(probabilities(table.actor, 3)[0]).toBeGreaterThan(0.26);
    expect(probabilities(table.actor, 1)[0]).toBeLessThan(0.25);
  });
});
