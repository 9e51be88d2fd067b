/** Laws of preference losses, KTO, the Lagrange multiplier, combined advantages and the pretraining mix. */
import { describe, expect, it } from 'vitest';
import { kto, ktoBaseline } from '../../src/losses/kto.js';
import { combineAdvantages, lagrangeMultiplier, safetyPenalty } from '../../src/losses/lagrange.js';
import { evaluateLoss, type Loss, type LossBatch, type LossResult, totalsOf } from '../../src/losses/loss.js';
import { pretrainingLoss, weighted } from '../../src/losses/mixed.js';
import { preferenceLosses } from '../../src/losses/preference.js';
import { addTotals } from '../../src/losses/selection.js';
import { crossEntropy } from '../../src/losses/sft.js';

interface Rows extends LossBatch {
  readonly logprobs: number[];
}

/** Packs rows of [log π, log q, learned, desirable]; z is 0.2. */
function pack(rows: readonly (readonly (readonly number[])[])[]): Rows {
  const column = (i: number) => rows.flatMap((row) => row.map((token) => token[i]!));
  return {
    lengths: rows.map((row) => row.length),
    mask: column(2),
    logprobs: column(0),
    columns: { referenceLogprobs: column(1), desirable: column(3), klBaseline: column(0).map(() => 0.2) },
  };
}

const rows = [
  [
    [9, 9, 0, 0],
    [-0.5, -0.7, 1, 1],
    [-1.5, -1.1, 1, 1],
  ],
  [[-0.3, -0.9, 1, 0]],
  [
    [-2.5, -2.2, 1, 0],
    [-0.1, -0.4, 1, 0],
    [-1.2, -1.3, 1, 0],
  ],
  [],
  [[-0.8, -0.2, 1, 1]],
  [
    [-1.4, -1.0, 1, 1],
    [-0.6, -0.5, 1, 1],
  ],
];

const evaluate = (loss: Loss, { logprobs, ...batch }: Rows, totals = totalsOf(batch)): LossResult =>
  evaluateLoss(loss, batch, { logprobs }, totals);

function expectAdditive(loss: Loss, cuts: readonly number[]): void {
  const whole = evaluate(loss, pack(rows));
  const parts = cuts.map((begin, i) => pack(rows.slice(begin, cuts[i + 1] ?? rows.length)));
  const totals = addTotals(parts.map(totalsOf));
  const results = parts.map((part) => evaluate(loss, part, totals));
  const sum = (of: (result: LossResult) => number) => results.reduce((total, result) => total + of(result), 0);
  expect(sum(({ loss: value }) => value)).toBeCloseTo(whole.loss, 12);
  expect(Object.keys(whole.statistics).length).toBeGreaterThan(0);
  for (const [name, value] of Object.entries(whole.statistics)) {
    expect(
      sum(({ statistics }) => statistics[name]!),
      name,
    ).toBeCloseTo(value, 12);
  }
  const joined = results.flatMap(({ gradients }) => [...gradients.logprobs!]);
  joined.forEach((gradient, t) => {
    expect(gradient).toBeCloseTo(whole.gradients.logprobs![t]!, 12);
  });
}

describe('the loss of a mini-batch is the sum over its micro-batches', () => {
  for (const [name, loss] of Object.entries(preferenceLosses)) {
    it(`${name}, cut between pairs`, () => {
      expectAdditive(loss({ beta: 0.3, labelSmoothing: 0.1, lengthNormalised: true, gamma: 0.2 }), [0, 2, 4]);
    });
  }
  it('KTO, cut anywhere: the point of reference is a column', () => {
    const loss = kto({ beta: 0.3, desirableWeight: 1.5, undesirableWeight: 0.5 });
    for (const cuts of [
      [0, 1, 4],
      [0, 3],
      [0, 1, 2, 3, 4, 5],
    ])
      expectAdditive(loss, cuts);
  });
  it('the pretraining loss', () => {
    expectAdditive(pretrainingLoss(2), [0, 3]);
  });
});

describe('preference losses', () => {
  const pair = (chosen: number, rejected: number) => pack([[[chosen, 0, 1, 1]], [[rejected, 0, 1, 0]]]);

  it('sink as the chosen answer becomes likelier, and rise with the rejected one', () => {
    for (const [name, loss] of Object.entries(preferenceLosses)) {
      const { gradients } = evaluate(loss({ beta: 0.1 }), pair(-1, -1.2));
      expect(gradients.logprobs![0], name).toBeLessThan(0);
      expect(gradients.logprobs![1], name).toBeGreaterThan(0);
    }
  });

  it('robust and smoothed DPO without noise are DPO', () => {
    const dpo = evaluate(preferenceLosses.dpo({ beta: 0.4 }), pair(-1, -3)).loss;
    expect(dpo).toBeCloseTo(Math.log1p(Math.exp(-0.8)), 12);
    expect(evaluate(preferenceLosses.dpo({ beta: 0.4, labelSmoothing: 0 }), pair(-1, -3)).loss).toBe(dpo);
    expect(evaluate(preferenceLosses.robust({ beta: 0.4 }), pair(-1, -3)).loss).toBeCloseTo(dpo, 12);
  });

  it('robust is unbiased: its mean over true and flipped labels is DPO on the true ones', () => {
    const loss = preferenceLosses.robust({ beta: 0.4, labelSmoothing: 0.2 });
    const [kept, flipped] = [evaluate(loss, pair(-1, -3)).loss, evaluate(loss, pair(-3, -1)).loss];
    const clean = evaluate(preferenceLosses.dpo({ beta: 0.4 }), pair(-1, -3)).loss;
    expect(0.8 * kept + 0.2 * flipped).toBeCloseTo(clean, 12);
  });

  it('EXO is 0 where the policy has the smoothed odds', () => {
    const odds = Math.log(0.9 / 0.1);
    const loss = preferenceLosses['exo-pair']({ beta: 1, labelSmoothing: 0.1 });
    expect(evaluate(loss, pair(odds - 5, -5)).loss).toBeCloseTo(0, 12);
    expect(evaluate(loss, pair(odds - 4, -5)).loss).toBeGreaterThan(1e-3);
  });

  it('IPO is least at a difference of 1/(2β), in sums or in means', () => {
    const twice = (x: number) => [
      [x, 0, 1, 1],
      [x, 0, 1, 1],
    ];
    const batch = pack([twice(-1), twice(-3.5)]);
    expect(evaluate(preferenceLosses.ipo({ beta: 0.1 }), batch).loss).toBeCloseTo(0, 12);
    expect(evaluate(preferenceLosses.ipo({ beta: 0.2, lengthNormalised: true }), batch).loss).toBeCloseTo(0, 12);
  });

  it('the hinge has no gradient beyond its margin', () => {
    const { loss, gradients } = evaluate(preferenceLosses.hinge({ beta: 1 }), pair(-1, -2.5));
    expect(loss).toBe(0);
    expect([...gradients.logprobs!].map(Math.abs)).toEqual([0, 0]);
  });

  it('SimPO and ORPO read no reference', () => {
    const { logprobs, ...batch } = pack(rows);
    for (const name of ['simpo', 'orpo'] as const) {
      const loss = preferenceLosses[name]({ beta: 1 });
      expect(evaluateLoss(loss, { ...batch, columns: {} }, { logprobs }).loss).toBeGreaterThan(0);
    }
  });

  it('SimPO asks for a margin of 1 where none is given, as the configuration does', () => {
    const { loss } = evaluate(preferenceLosses.simpo({ beta: 2 }), pair(-1, -1.25));
    expect(loss).toBeCloseTo(Math.log1p(Math.exp(0.5)), 10);
  });

  it('ORPO is finite, with a gradient, where a float32 log-prob of 0 says that an answer is certain', () => {
    for (const [chosen, rejected] of [
      [0, -1],
      [-1, 0],
      [0, 0],
    ] as const) {
      const { loss, gradients } = evaluate(preferenceLosses.orpo({ beta: 1 }), pair(chosen, rejected));
      expect(loss).toBeLessThan(20);
      expect(gradients.logprobs![0]).toBeLessThan(0);
      expect(gradients.logprobs![1]).toBeGreaterThan(0);
    }
  });

  it('is 0 for a batch without pairs', () => {
    for (const loss of Object.values(preferenceLosses))
      expect(evaluate(loss({ beta: 0.1 }), pack([])).loss).toBeCloseTo(0, 15);
  });
});

describe('KTO', () => {
  it('has a point of reference of at least 0, and of 0 without pairs', () => {
    expect(ktoBaseline([-1, -2], [-2, -4])).toBe(1.5);
    expect(ktoBaseline([-3, -2], [-2, -4])).toBe(0.5);
    expect(ktoBaseline([-3, -2], [-2, -1])).toBe(0);
    expect(ktoBaseline([], [])).toBe(0);
    expect(ktoBaseline([Number.NaN], [0])).toBeNaN();
  });

  it('weighs either kind, and reports the rewards of either', () => {
    const batch = pack([[[-1, -2, 1, 1]], [[-4, -2, 1, 0]]]);
    const sigmoid = (x: number) => 1 / (1 + Math.exp(-x));
    const { loss, statistics } = evaluate(kto({ beta: 0.5, desirableWeight: 3, undesirableWeight: 2 }), batch);
    expect(loss).toBeCloseTo((3 * sigmoid(-0.4) + 2 * sigmoid(-1.1)) / 2, 12);
    expect(statistics).toEqual({
      desirable: 0.5,
      rewardsDesirable: 0.25,
      rewardsUndesirable: -0.5,
      klBaseline: expect.closeTo(0.2, 12),
    });
  });

  it('an answer without a learned token adds nothing but its place in the mean', () => {
    const answer = [[-1, -2, 1, 1]];
    const alone = evaluate(kto({ beta: 0.5 }), pack([answer]));
    const beside = evaluate(kto({ beta: 0.5 }), pack([answer, [[-4, -2, 0, 0]]]));
    expect(beside.loss).toBeCloseTo(alone.loss / 2, 12);
  });
});

describe('the Lagrange multiplier', () => {
  const settings = { initial: 1, learningRate: 0.1, threshold: 0, window: 1 };
  const afterCosts = (costs: number[][], changes = {}) => {
    const lagrange = lagrangeMultiplier({ ...settings, ...changes });
    for (const episode of costs) lagrange.update(episode);
    return lagrange;
  };

  it('rises while costs lie above the threshold and falls below it', () => {
    const lagrange = afterCosts([[2]]);
    expect(lagrange.multiplier).toBeCloseTo(Math.exp(0.2), 12);
    lagrange.update([-1]);
    expect(lagrange.multiplier).toBeLessThan(Math.exp(0.2));
    expect(afterCosts([[0.3]], { threshold: 0.3, initial: 1.5 }).multiplier).toBeCloseTo(1.5, 14);
  });

  it('averages the newest episodes of the window, across rollouts', () => {
    const lagrange = afterCosts(
      [
        [1, 2],
        [3, 4, 5],
      ],
      { window: 4 },
    );
    expect(lagrange.meanCost).toBe(3.5);
    expect(lagrange.state().costs).toEqual([2, 3, 4, 5]);
    expect(lagrangeMultiplier(settings).meanCost).toBe(0);
  });

  it('stays below its maximum, and still before the delay, without costs and beyond the bound of its loss', () => {
    expect(afterCosts([[5], [5], [5]], { maximum: 1.2 }).multiplier).toBeCloseTo(1.2, 12);
    expect(afterCosts([[5], [5]], { delay: 2 }).multiplier).toBe(1);
    expect(afterCosts([[5], [5], [5]], { delay: 2 }).multiplier).toBeGreaterThan(1);
    expect(afterCosts([[]]).multiplier).toBe(1);
    expect(afterCosts([[1e6 + 1]]).multiplier).toBe(1);
    expect(afterCosts([[1e6]], { learningRate: 1e-6 }).multiplier).toBeCloseTo(Math.E, 12);
  });

  it('continued from a state that went through JSON is the multiplier that never stopped', () => {
    const changes = { window: 3, delay: 1 };
    const costs = [[0.7, 1.3], [-0.2], [2.1, 0.1], [0.4]];
    const whole = afterCosts(costs, changes);
    const resumed = lagrangeMultiplier({ ...settings, ...changes });
    resumed.restore(JSON.parse(JSON.stringify(afterCosts(costs.slice(0, 2), changes).state())));
    for (const episode of costs.slice(2)) resumed.update(episode);
    expect(resumed.state()).toEqual(whole.state());
    expect(resumed.multiplier).toBe(whole.multiplier);
  });

  it('refuses a saved state that is not one of finite numbers', () => {
    const state = { logMultiplier: 0, costs: [1], updates: 1 };
    const restore = (changes: object) => () => lagrangeMultiplier(settings).restore({ ...state, ...changes });
    const refused = expect.objectContaining({ code: 'CHECKPOINT_CONTROLLER' });
    for (const changes of [{ logMultiplier: null }, { costs: [Number.NaN] }, { costs: 'none' }, { updates: '1' }]) {
      expect(restore(changes)).toThrow(refused);
    }
    expect(restore({ logMultiplier: Number.NaN })).toThrow(/log λ NaN after 1 updates.*older checkpoint/);
    expect(restore({})).not.toThrow();
  });
});

describe('Safe-RLHF', () => {
  it('weighs rewards against costs; λ = 0 is PPO', () => {
    expect([...combineAdvantages([1, -2], [0.5, 4], 1)]).toEqual([0.25, -3]);
    expect([...combineAdvantages([1, -2], [0.5, 4], 0)]).toEqual([1, -2]);
    expect([...combineAdvantages([1, Number.NaN], [0.5, Number.NaN], 1, [1, 0])]).toEqual([0.25, 0]);
  });

  it('moving away from the reference loses reward and adds as much cost', () => {
    const batch = { lengths: [2], mask: [1, 1], logprobs: [-1, -2], reference: [-1.5, -1] };
    const scores = { rewardScores: [0, 1], costScores: [0, 1] };
    const { rewards, costs } = safetyPenalty({ ...batch, ...scores }, { coefficient: 0.1, estimator: 'k1' });
    expect(rewards.rewards[0]).toBeCloseTo(-0.05, 12);
    expect(costs[0]).toBeCloseTo(0.05, 12);
    expect(rewards.rewards[1]! - 1).toBeCloseTo(1 - costs[1]!, 12);
  });
});

describe('a weighted loss', () => {
  it('has the weight in value and gradient, not in its statistics', () => {
    const { loss, gradients, statistics } = evaluate(pretrainingLoss(3), pack(rows));
    const plain = evaluate(crossEntropy(), pack(rows));
    expect(loss).toBeCloseTo(3 * plain.loss, 12);
    expect(statistics).toEqual({ pretrainingLoss: plain.loss });
    gradients.logprobs!.forEach((gradient, t) => {
      expect(gradient).toBeCloseTo(3 * plain.gradients.logprobs![t]!, 12);
    });
  });

  it('of weight 0 has a gradient of zeros', () => {
    const { loss, gradients } = evaluate(weighted(crossEntropy(), 0), pack(rows));
    expect(loss).toBe(0);
    expect([...gradients.logprobs!].every((gradient) => gradient === 0)).toBe(true);
  });
});
