/** Laws of group advantages, returns and the overlong punishment; literals that other projects publish. */
import { describe, expect, it } from 'vitest';
import { overlongPenalties } from '../../src/data/overlong.js';
import {
  type GroupAdvantageName,
  groupAdvantages,
  groupCounts,
  overTokens,
  promptMeanWeights,
  returnsToGo,
} from '../../src/losses/group-advantages.js';
import { evaluateLoss, totalsOf } from '../../src/losses/loss.js';
import { policyLosses } from '../../src/losses/policy-losses.js';
import { whiten } from '../../src/losses/statistics.js';
import { optimalTokenBaseline, remaxReturns } from '../../src/losses/token-baselines.js';

const close = (actual: ArrayLike<number>, expected: number[], digits = 6) => {
  expect(actual.length).toBe(expected.length);
  expected.forEach((want, i) => {
    expect(actual[i]).toBeCloseTo(want, digits);
  });
};
/** Those that compare the sequences of a group with each other. */
const comparing = (Object.keys(groupAdvantages) as GroupAdvantageName[]).filter((name) => name !== 'remax');
const extras = (scores: readonly number[]) => ({
  scores,
  rewards: [scores],
  baselines: scores.map(() => 0),
  lengths: scores.map((_, b) => (b % 3) + 1),
});

describe('group advantages', () => {
  it('have the published values', () => {
    const pairs = { scores: [6, 3, 9, 12], groups: [0, 0, 1, 1] };
    close(groupAdvantages.rloo(pairs), [3, -3, -3, 3]);
    close(groupAdvantages['dr-grpo'](pairs), [1.5, -1.5, -1.5, 1.5]);
    close(groupAdvantages.maxrl(pairs), [0.3333333, -0.3333333, -0.1428571, 0.1428571]);
    close(groupAdvantages.grpo({ scores: [6, 3], groups: [0, 0] }), [0.7071064, -0.7071064]);
    const three = { scores: [1, 2, 3], groups: [0, 0, 0] };
    close(groupAdvantages.grpo(three, { epsilon: 1e-4 }), [-0.9999, 0, 0.9999]);
    // Leave-one-out: baselines 2.5, 2, 1.5 and deviations .7071068, 1.4142136, .7071068.
    close(groupAdvantages.grpo(three, { baseline: 'others', epsilon: 0 }), [
      -1.5 / Math.SQRT1_2,
      0,
      1.5 / Math.SQRT1_2,
    ]);
    // Of two, the other one alone has no deviation: not divided.
    close(groupAdvantages.grpo({ scores: [6, 3], groups: [0, 0] }, { baseline: 'others' }), [3, -3]);
  });

  for (const name of comparing) {
    it(`${name}: equal scores have advantage exactly 0, however their mean rounds`, () => {
      const groups = { ...extras([0.1, 0.1, 0.1, 1, 2, 4]), groups: [0, 0, 0, 1, 1, 1] };
      const advantages = groupAdvantages[name](groups);
      expect([...advantages.subarray(0, 3)]).toEqual([0, 0, 0]);
      expect(advantages.subarray(3).some((x) => x !== 0)).toBe(true);
    });

    it(`${name}: the order of the sequences does not matter`, () => {
      const groups = { ...extras([3, 1, 4, 1.5, 9, 2]), groups: [7, 7, 7, 2, 2, 2] };
      const order = [3, 0, 4, 1, 5, 2];
      const shuffle = (x: readonly number[]) => order.map((row) => x[row]!);
      const shuffled = {
        scores: shuffle(groups.scores),
        groups: shuffle(groups.groups),
        lengths: shuffle(groups.lengths),
        rewards: [shuffle(groups.scores)],
      };
      const expected = shuffle([...groupAdvantages[name](groups)]);
      close(groupAdvantages[name](shuffled), expected, 13);
    });

    it(`${name}: a sequence without a learned token changes nothing and gets 0`, () => {
      const whole = { ...extras([3, 1, 4, 1.5]), groups: [0, 0, 0, 1] };
      const scores = [3, 100, 1, 4, 1.5, -50];
      const more = {
        scores,
        groups: [0, 0, 0, 0, 1, 2],
        lengths: [whole.lengths[0]!, 0, whole.lengths[1]!, whole.lengths[2]!, whole.lengths[3]!, 0],
        rewards: [scores],
      };
      const [a, b, c, d] = groupAdvantages[name](whole);
      close(groupAdvantages[name](more), [a!, 0, b!, c!, d!, 0], 15);
    });

    it(`${name}: a lone score is 0, or kept against mean 0 and deviation 1`, () => {
      const lone = { ...extras([2]), groups: [0] };
      expect([...groupAdvantages[name](lone)]).toEqual([0]);
      close(groupAdvantages[name](lone, { singletons: 'keep' }), [2], 5);
    });
  }

  it('of GPG grow by the share of sequences with a score', () => {
    const groups = { scores: [1, 0, 0, 0], groups: [0, 0, 1, 1] };
    expect([...groupAdvantages.gpg(groups)]).toEqual([2, -2, 0, 0]);
    expect([...groupAdvantages.gpg(groups, { normalizer: 2 })]).toEqual([1, -1, 0, 0]);
  });

  it('of ReMax are the distance from the greedy answer', () => {
    const groups = { scores: [2, 1, 5], groups: [0, 0, 1], baselines: [0.5, 0.5, 7], lengths: [1, 2, 0] };
    expect([...groupAdvantages.remax(groups)]).toEqual([1.5, 0.5, 0]);
  });

  it('are counted where there is nothing to learn', () => {
    const groups = { scores: [1, 1, 2, 3, 4, 9], groups: [0, 0, 1, 2, 2, 3], lengths: [1, 1, 1, 1, 1, 0] };
    expect(groupCounts(groups)).toEqual({ groups: 3, singletons: 1, equal: 1, empty: 1 });
  });

  it('refuse arrays of different lengths, and the absence of one that they read', () => {
    expect(() => groupAdvantages.grpo({ scores: [1, 2], groups: [0] })).toThrow(/1 group ids and 2 numbers/);
    const groups = { scores: [1], groups: [0] };
    for (const [name, column] of [
      ['opo', 'lengths'],
      ['gdpo', 'rewards'],
      ['remax', 'baselines'],
    ] as const) {
      expect(() => groupAdvantages[name](groups)).toThrow(
        expect.objectContaining({ code: 'LOSS_COLUMN', message: expect.stringContaining(`"${column}"`) }),
      );
    }
    expect(() => overTokens([1], [1, 1], [1, 1])).toThrow(expect.objectContaining({ code: 'LOSS_SHAPE' }));
  });
});

describe('advantages per token', () => {
  const nan = Number.NaN;

  it('spread over learned tokens', () => {
    expect([...overTokens([2, 3, 4], [2, 0, 2], [1, 0, 1, 1])]).toEqual([2, 0, 4, 4]);
  });

  it('of REINFORCE++ step over gaps, and whiten to the published values of both variances', () => {
    const returns = returnsToGo({ lengths: [5], mask: [1, 0, 1, 0, 1], rewards: [1, nan, 2, 100, 3] }, 0.5);
    expect([...returns]).toEqual([2.75, 0, 3.5, 0, 3]);
    const mask = [1, 1, 1];
    close(whiten([2.75, 3.5, 3], mask), [-0.8728715, 1.0910894, -0.2182179]);
    close(whiten([2.75, 3.5, 3], mask, { variance: 'population' }), [-1.0690449, 1.3363061, -0.2672613]);
  });

  it('of ReMax: the authors do not accumulate the KL, the other form does', () => {
    const batch = { lengths: [4], mask: [1, 0, 1, 1] };
    const kl = [0.1, nan, 0.2, 0.3];
    const returns = remaxReturns({ ...batch, kl, scores: [2], baselines: [0.5] }, { beta: 0.1, gamma: 1 });
    close(returns, [1.49, 0, 1.48, 1.47], 12);
    const rewards = [-0.01, nan, -0.02, 2 - 0.03];
    const accumulated = returnsToGo({ ...batch, rewards }, 1).map((x, t) => (batch.mask[t] ? x - 0.5 : 0));
    close(accumulated, [1.44, 0, 1.45, 1.47], 12);
  });

  it('have no token baseline where one answer is left, nor a division by 0 for a policy without a choice', () => {
    const batch = { lengths: [1, 3, 1], mask: [1, 1, 1, 1, 1], groups: [0, 0, 1], returns: [1, 3, 3, 3, 5] };
    const certain = { logprobs: [0, 0, 0, 0, 0], sumOfSquares: [1, 1, 1, 1, 1] };
    expect([...optimalTokenBaseline({ ...batch, ...certain })]).toEqual([1, 3, 3, 3, 5]);
    const even = { logprobs: Array<number>(5).fill(Math.log(0.5)), sumOfSquares: Array<number>(5).fill(0.5) };
    close(optimalTokenBaseline({ ...batch, ...even }), [-1, 1, 3, 3, 5], 6);
  });
});

describe('mean over prompts', () => {
  const batch = { lengths: [2, 3, 1, 2], mask: [1, 1, 1, 0, 1, 0, 1, 1], groups: [7, 3, 9, 7] };
  const losses = [1, 2, 3, NaN, 5, NaN, 6, 7];

  it("is the mean of the prompts' token means; one without a learned token is not counted", () => {
    const weights = promptMeanWeights(batch);
    const terms = losses.map((loss, t) => (batch.mask[t] ? loss * weights[t]! : 0));
    expect(terms.reduce((a, b) => a + b)).toBeCloseTo(((1 + 2 + 6 + 7) / 4 + (3 + 5) / 2) / 2, 12);
    close(weights, [1 / 8, 1 / 8, 1 / 4, 0, 1 / 4, 0, 1 / 8, 1 / 8], 12);
  });

  it('comes out the same from micro-batches that part the answers to a prompt, with its gradient', () => {
    const { lengths, mask } = batch;
    const columns = { oldLogprobs: losses, advantages: losses.map(() => -1), weights: promptMeanWeights(batch) };
    const loss = policyLosses.reinforce({ weighted: true, aggregation: { mode: 'token-sum' } });
    const evaluate = (rows: [number, number], tokens: [number, number]) => {
      const cut = <T>(x: Iterable<T>) => [...x].slice(...tokens);
      const part = {
        lengths: lengths.slice(...rows),
        mask: cut(mask),
        columns: {
          oldLogprobs: cut(columns.oldLogprobs),
          advantages: cut(columns.advantages),
          weights: cut(columns.weights),
        },
      };
      return evaluateLoss(
        loss,
        part,
        { logprobs: cut(losses), entropies: cut(losses) },
        totalsOf({ ...batch, columns }),
      );
    };
    const whole = evaluate([0, 4], [0, 8]);
    const parts = [evaluate([0, 2], [0, 5]), evaluate([2, 4], [5, 8])];
    expect(whole.loss).toBeCloseTo(4, 12);
    expect(parts[0]!.loss + parts[1]!.loss).toBeCloseTo(whole.loss, 12);
    close(
      parts.flatMap(({ gradients }) => [...gradients.logprobs!]),
      [...columns.weights],
      12,
    );
  });

  it('with nothing learned is 0, and wants a group for each sequence', () => {
    expect([...promptMeanWeights({ ...batch, mask: batch.mask.map(() => 0) })]).toEqual(Array(8).fill(0));
    const shape = expect.objectContaining({ code: 'LOSS_SHAPE' });
    expect(() => promptMeanWeights({ ...batch, groups: [7, 3] })).toThrow(shape);
  });
});

describe('the soft overlong punishment', () => {
  it('has the published amounts', () => {
    const settings = { maxLength: 100, cache: 20 };
    close(overlongPenalties([80, 90, 100, 110], settings), [0, -0.5, -1, -1], 12);
    close(overlongPenalties([80, 90, 100, 110], { ...settings, capped: false }), [0, -0.5, -1, -1.5], 12);
    expect(overlongPenalties([0], settings)[0]).toBe(0);
  });
});
