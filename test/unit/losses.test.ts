/** Laws of losses, advantages, KL and statistics; literals that other projects and papers publish. */
import { describe, expect, it } from 'vitest';
import { gae } from '../../src/losses/advantages.js';
import { type Aggregation, aggregate } from '../../src/losses/aggregation.js';
import { adaptiveKl, fixedKl } from '../../src/losses/controllers.js';
import { type KlClamp, klEstimate, klPenalty } from '../../src/losses/kl.js';
import { evaluateLoss, outputsOf, totalsOf } from '../../src/losses/loss.js';
import { clippedSurrogate, type PolicyLossSettings, policyLoss } from '../../src/losses/policy.js';
import { bradleyTerry } from '../../src/losses/reward-model.js';
import { addTotals, select } from '../../src/losses/selection.js';
import { crossEntropy } from '../../src/losses/sft.js';
import { explainedVariance, whiten } from '../../src/losses/statistics.js';
import { TokenArray } from '../../src/losses/tokens.js';
import { valueLoss } from '../../src/losses/value.js';
import { categorical, categoricalKl } from '../categorical.js';

const close = (actual: ArrayLike<number>, expected: number[], digits = 6) => {
  expect(actual.length).toBe(expected.length);
  expected.forEach((want, i) => {
    expect(actual[i]).toBeCloseTo(want, digits);
  });
};

const one = (n: number) => Array<number>(n).fill(1);

function policy(advantages: number[], oldLogprobs: number[], logprobs: number[], settings: PolicyLossSettings) {
  const n = logprobs.length;
  const batch = { lengths: [n], mask: one(n), columns: { advantages, oldLogprobs } };
  const selection = select([n], one(n));
  const tokens = clippedSurrogate(
    {
      logprobs: TokenArray.leaf(selection, logprobs),
      oldLogprobs: TokenArray.constant(selection, oldLogprobs),
      advantages: TokenArray.constant(selection, advantages),
    },
    settings,
  );
  return { tokens: tokens.data, ...evaluateLoss(policyLoss(settings), batch, { logprobs, entropies: one(n) }) };
}

describe('the policy loss', () => {
  const [advantages, old, current] = [
    [1, -1, 2],
    [-1, -1, -1],
    [-1.69315, -1, -0.59453],
  ];

  it('has the published tokens, mean, gradient and statistics', () => {
    const { tokens, loss, gradients, statistics } = policy(advantages, old, current, { clip: 0.2 });
    close(tokens, [-0.4999986, 1, -2.4]);
    expect(loss).toBeCloseTo(-0.6333329, 6);
    close(gradients.logprobs!, [-0.1666662, 0.3333333, 0]);
    expect(statistics.kl).toBeCloseTo(0.0958953, 6);
    expect(statistics.outsideFraction).toBeCloseTo(2 / 3, 12);
    expect(statistics.clipFraction).toBeCloseTo(1 / 3, 12);
  });

  it('bounds the loss of bad actions by dual clip only where the advantage is negative', () => {
    const dual = policy([1, -1, -4], [-1, -1, -3], [-1.69315, -1, -0.69741], { clip: 0.2, dualClip: 3 });
    close(dual.tokens, [-0.4999986, 1, 12], 5);
    expect(dual.loss).toBeCloseTo(4.1666671, 6);
    const ratios = [2, 2, 0.5].map(Math.log);
    close(policy([2, -2, 2], [0, 0, 0], ratios, { clip: 0.2, dualClip: 1.5 }).tokens, [-2.4, 3, -1]);
  });

  it('agrees with the clipped surrogate of rlax, for advantages of both signs', () => {
    const actions = [0, 1, 2];
    const of = (logits: number[][]) => logits.map((row, t) => categorical(row).logprobs[actions[t]!]!);
    const logprobs = of([
      [1, 1, 1],
      [2, 0, 0],
      [-1, -2, -3],
    ]);
    const oldLogprobs = of([
      [1, 1, 1],
      [2, 0, 0],
      [-3, -2, -1],
    ]);
    expect(policy([0.3, 0.2, 0.1], oldLogprobs, logprobs, { clip: 0.2 }).loss).toBeCloseTo(-0.1711778, 6);
    expect(policy([-0.3, -0.2, -0.1], oldLogprobs, logprobs, { clip: 0.2 }).loss).toBeCloseTo(0.1933333, 6);
  });

  it('on the policy that sampled has ratio 1: gradient −A/M, nothing clipped, KL exactly 0', () => {
    const { gradients, statistics, loss } = policy(advantages, old, old, { clip: 0.2 });
    close(
      gradients.logprobs!,
      advantages.map((x) => -x / 3),
      15,
    );
    expect(statistics).toMatchObject({ clipFraction: 0, kl: 0, klLinear: expect.closeTo(0, 15), outliers: 0 });
    expect(loss).toBeCloseTo(-2 / 3, 15);
  });

  it('clips once the policy has moved: the gradient of a token beyond the clip is 0', () => {
    const { gradients, statistics } = policy([1, 1], [-1, -1], [-0.5, -1.5], { clip: 0.2 });
    expect(gradients.logprobs![0]).toBe(0);
    expect(gradients.logprobs![1]).toBeLessThan(0);
    expect(statistics.clipFraction).toBe(0.5);
  });

  it('is finite in value and gradient for a ratio that overflows where the clipped branch is chosen', () => {
    const { loss, gradients, statistics } = policy([1], [-800], [-1], { clip: 0.2 });
    expect(loss).toBeCloseTo(-1.2, 12);
    expect(Array.from(gradients.logprobs!)).toEqual([0]);
    expect(statistics.outliers).toBe(1);
  });

  it('has a KL term with a gradient, and an entropy bonus that raises entropy', () => {
    const batch = {
      lengths: [2],
      mask: [1, 1],
      columns: { advantages: [0, 0], oldLogprobs: [-1, -1], referenceLogprobs: [-2, -0.5] },
    };
    const loss = policyLoss({ clip: 0.2, kl: { coefficient: 0.1, estimator: 'k2' }, entropyCoefficient: 0.01 });
    const { gradients } = evaluateLoss(loss, batch, { logprobs: [-1, -1], entropies: [1, 1] });
    close(gradients.logprobs!, [0.05, -0.025], 12);
    close(gradients.entropies!, [-0.005, -0.005], 12);
  });

  it('asks the engine for a gradient of entropies only when the bonus has a weight', () => {
    expect(policy([1], [0], [0], { clip: 0.2 }).gradients.entropies).toBeUndefined();
    expect(outputsOf(policyLoss({ clip: 0.2 }))).toEqual(['logprobs', 'entropies']);
    expect(outputsOf(valueLoss({}))).toEqual(['values']);
  });
});

describe('the value loss', () => {
  it('has the published value and gradient', () => {
    const batch = { lengths: [3], mask: one(3), columns: { oldValues: [0, 1, 0], returns: [1, 1, 1] } };
    const { loss, gradients } = evaluateLoss(valueLoss({ clip: 0.2 }), batch, { values: [0.5, 2, -1] });
    expect(loss).toBeCloseTo(0.94, 12);
    close(gradients.values!, [0, 1 / 3, -2 / 3], 12);
  });
});

describe('the reward-model loss', () => {
  it('has the closed-form value and gradient, with and without margin', () => {
    const evaluate = (margin: number) =>
      evaluateLoss(
        bradleyTerry(),
        { lengths: [1, 1], mask: [1, 1], columns: { margins: [margin, 0] } },
        { values: [1, 0] },
      );
    expect(evaluate(0).loss).toBeCloseTo(0.3132617, 7);
    expect(evaluate(0.5).loss).toBeCloseTo(0.474077, 6);
    close(evaluate(0).gradients.values!, [-0.2689414, 0.2689414], 7);
  });
});

describe('a loss over micro-batches', () => {
  it('adds up to the loss, statistics and gradients of the whole mini-batch', () => {
    const lengths = [2, 0, 3, 1];
    const mask = [1, 1, 0, 1, 1, 0];
    const outputs = { logprobs: [-0.5, -1, 9, -2, -0.1, 9], entropies: [1, 2, 9, 3, 4, 9] };
    const columns = { advantages: [1, -2, 9, 0.5, -1, 9], oldLogprobs: [-0.9, -1.1, 9, -1.5, -0.4, 9] };
    for (const mode of ['token-mean', 'seq-mean-token-mean', 'seq-mean-token-sum'] as const) {
      const loss = policyLoss({ clip: 0.2, aggregation: { mode }, entropyCoefficient: 0.1 });
      const whole = evaluateLoss(loss, { lengths, mask, columns }, outputs);
      const cut = (x: number[], part: number) => (part === 0 ? x.slice(0, 2) : x.slice(2));
      const parts = [0, 1].map((part) => ({
        batch: {
          lengths: part === 0 ? [2, 0] : [3, 1],
          mask: cut(mask, part),
          columns: { advantages: cut(columns.advantages, part), oldLogprobs: cut(columns.oldLogprobs, part) },
        },
        outputs: { logprobs: cut(outputs.logprobs, part), entropies: cut(outputs.entropies, part) },
      }));
      const totals = addTotals(parts.map(({ batch }) => totalsOf(batch)));
      expect(totals).toEqual({ tokens: 4, sequences: 2, rows: 4, chosenTokens: 4 });
      const results = parts.map((part) => evaluateLoss(loss, part.batch, part.outputs, totals));
      expect(results[0]!.loss + results[1]!.loss).toBeCloseTo(whole.loss, 14);
      for (const [name, value] of Object.entries(whole.statistics)) {
        expect(results[0]!.statistics[name]! + results[1]!.statistics[name]!).toBeCloseTo(value, 14);
      }
      const joined = results.flatMap(({ gradients }) => [...gradients.logprobs!]);
      expect(joined).toEqual([...whole.gradients.logprobs!]);
    }
  });

  it('is 0 with gradients 0 when nothing is learned', () => {
    const { loss, gradients } = evaluateLoss(
      crossEntropy(),
      { lengths: [2], mask: [0, 0], columns: {} },
      { logprobs: [Number.NaN, -1] },
    );
    expect(loss).toBe(0);
    expect([...gradients.logprobs!]).toEqual([0, 0]);
  });

  it('refuses a batch without a column that it reads, or with one of a wrong length', () => {
    const batch = { lengths: [1], mask: [1], columns: {} };
    expect(() => evaluateLoss(valueLoss({}), batch, { values: [1] })).toThrow(/reads "oldValues".*hold: none/);
    expect(() => evaluateLoss(crossEntropy(), batch, {})).toThrow(/reads "logprobs".*model outputs/);
    expect(() => evaluateLoss(crossEntropy(), batch, { logprobs: [1, 2] })).toThrow(/2 numbers.*1 tokens/);
    expect(() => select([2], [1, 1, 1])).toThrow(/2 tokens by its lengths, but its mask has 3/);
  });
});

describe('aggregation', () => {
  const reduce = (rows: number[][], mask: number[][], aggregation: Aggregation) => {
    const selection = select(
      rows.map((row) => row.length),
      mask.flat(),
    );
    return aggregate(TokenArray.leaf(selection, rows.flat()), aggregation).value;
  };
  it('has the published values', () => {
    const token: Aggregation = { mode: 'token-mean' };
    expect(
      reduce(
        [
          [1, 2, 3],
          [4, 5, 6],
        ],
        [
          [1, 1, 0],
          [1, 1, 1],
        ],
        token,
      ),
    ).toBeCloseTo(3.6, 12);
    expect(reduce([[1, 2]], [[0, 0]], token)).toBe(0);
    expect(
      reduce(
        [
          [1, 2],
          [3, 4],
        ],
        [
          [1, 1],
          [1, 0],
        ],
        { mode: 'seq-mean-token-mean' },
      ),
    ).toBeCloseTo(2.25, 12);
    const constant: Aggregation = { mode: 'seq-mean-token-sum-norm', horizon: 10, sequences: 'all' };
    expect(
      reduce(
        [
          [2, 3],
          [9, 12],
        ],
        [
          [1, 1],
          [1, 0],
        ],
        constant,
      ),
    ).toBeCloseTo(0.7, 12);
    const rollouts = [1, 10, 100, 1000].map((s) => [1, 2, 3, 4, 5, 6, 7, 8].map((i) => s * i));
    expect(
      reduce(
        rollouts,
        rollouts.map(() => one(8)),
        { mode: 'seq-mean-token-mean' },
      ),
    ).toBeCloseTo(1249.875, 9);
  });
});

describe('KL', () => {
  const estimate = (estimator: 'k1' | 'k2' | 'k3', lp: number[], lq: number[], clamp: KlClamp = {}) => {
    const selection = select([lp.length], one(lp.length));
    return klEstimate(TokenArray.leaf(selection, lp), TokenArray.constant(selection, lq), estimator, clamp).data;
  };
  it('estimators have the published values, clamped only when asked', () => {
    const [lp, lq] = [
      [-1, -1, -1],
      [0, -15, -30],
    ];
    close(estimate('k1', lp, lq), [-1, 14, 29]);
    close(estimate('k2', lp, lq), [0.5, 98, 420.5]);
    close(estimate('k3', lp, lq), [0.7182818, 13.0000008, 28]);
    close(estimate('k3', lp, lq, { input: 20, output: 10 }), [0.7182818, 10, 10]);
    const mean = estimate('k3', [0, -1, -2], [-1, -1, -1]).reduce((x, y) => x + y) / 3;
    expect(0.1 * mean).toBeCloseTo(0.0362054, 7);
  });

  it('of two categoricals is the published number', () => {
    const [p, q] = [categorical([1, 1, 0]), categorical([1, 2, 0])];
    expect(categoricalKl(p, q).kl).toBeCloseTo(0.1232924, 7);
    expect(categoricalKl(q, p).kl).toBeCloseTo(0.1196298, 7);
  });

  it('in the reward lowers every token and keeps the score at the last one', () => {
    const batch = { lengths: [3], mask: one(3), scores: [0, 0, 1], logprobs: [0, 0, 0], reference: [-2, -2, -2] };
    const { rewards, mean, perSequence } = klPenalty(batch, { coefficient: 0.1, estimator: 'k1' });
    close(rewards, [-0.2, -0.2, 0.8], 12);
    expect([mean, perSequence]).toEqual([2, 6]);
    const { advantages } = gae({ ...batch, rewards, values: [0, 0, 0] }, { gamma: 1, lambda: 1 });
    close(advantages, [0.4, 0.6, 0.8], 12);
    const free = klPenalty({ ...batch, reference: [-Infinity, 0, 0] }, { coefficient: 0, estimator: 'k1' });
    expect([...free.rewards]).toEqual([0, 0, 1]);
  });

  it('controllers: the published step, fixed stays, and state survives a round trip', () => {
    const adaptive = adaptiveKl({ coefficient: 0.2, target: 0.1, horizon: 100 });
    adaptive.update(0.2, 10);
    expect(adaptive.coefficient).toBeCloseTo(0.204, 12);
    const restored = adaptiveKl({ coefficient: 9, target: 0.1, horizon: 100 });
    restored.restore(JSON.parse(JSON.stringify(adaptive.state())));
    for (const controller of [adaptive, restored]) controller.update(0.05, 7);
    expect(restored.coefficient).toBe(adaptive.coefficient);
    const fixed = fixedKl(0.05);
    fixed.update(100, 100);
    expect(fixed.coefficient).toBe(0.05);
    expect(() => fixed.restore({ coefficient: Number.NaN })).toThrow(/CHECKPOINT|finite/);
  });
});

describe('GAE', () => {
  const run = (rewards: number[], values: number[], gamma: number, lambda: number, mask = one(rewards.length)) =>
    gae({ lengths: [rewards.length], mask, rewards, values }, { gamma, lambda });

  it('has the published advantages and returns', () => {
    close(run([0, 0, 5], [1, 2, 3], 1, 0).advantages, [1, 1, 2], 12);
    close(run([1, 2, 3], [0.5, 1, 1.5], 1, 1).returns, [6, 5, 3], 12);
    close(run([1, 2, 3], [0.5, 1, 1.5], 0.5, 1).returns, [2.75, 3.5, 3], 12);
    close(run([1, 2, 3], [0.5, 1, 1.5], 1, 0.5).returns, [3.625, 4.25, 3], 12);
  });

  it('bootstraps from the value after the last action when asked (rlax, first row)', () => {
    const batch = {
      lengths: [5],
      mask: one(5),
      rewards: [0, 0, 1, 0, -0.5],
      values: [1, 4, -3, -2, -1],
      bootstrap: [-1],
    };
    const of = (lambda: number) => gae(batch, { gamma: 0.99, lambda }).advantages;
    close(of(1), [-1.4511881, -4.4557455, 2.539651, 0.5249, -0.49], 5);
    close(of(0.7), [-0.6769795, -5.2481667, 2.484608, 0.67043, -0.49], 5);
    close(of(0.4), [0.5673187, -6.0421244, 2.3431202, 0.81596, -0.49], 5);
  });

  it('steps over gaps, whatever their values and rewards are', () => {
    const gap = run([0, 0, Number.NaN, 0, 1], [0.1, 0.2, Number.NaN, 0.4, 0.5], 0.99, 0.95, [1, 1, 0, 1, 1]);
    const without = run([0, 0, 0, 1], [0.1, 0.2, 0.4, 0.5], 0.99, 0.95);
    close(gap.advantages, [0.7823244, 0.7276176, 0, 0.56525, 0.5]);
    expect([...gap.advantages].filter((_, t) => t !== 2)).toEqual([...without.advantages]);
    const { advantages, returns } = run([1, 2, 3], [0.5, 1, 1.5], 1, 1, [1, 0, 1]);
    close(advantages, [3.5, 0, 1.5], 12);
    close(returns, [4, 0, 3], 12);
    close(whiten(advantages, [1, 0, 1]), [Math.SQRT1_2, 0, -Math.SQRT1_2]);
  });

  it('does not bootstrap from a masked last value', () => {
    close(run([0, 1, 0], [0, 0, 100], 1, 0.95, [1, 1, 0]).advantages, [0.95, 1, 0], 12);
  });

  it('never crosses from one sequence into the next', () => {
    const together = gae(
      { lengths: [2, 1], mask: one(3), rewards: [1, 2, 50], values: [0.1, 0.2, 30] },
      { gamma: 1, lambda: 1 },
    );
    close(together.advantages.subarray(0, 2), [...run([1, 2], [0.1, 0.2], 1, 1).advantages], 12);
  });
});

describe('statistics', () => {
  it('whitening has the published values; one number is kept, none is zeros', () => {
    close(whiten([2.75, 3.5, 3], one(3)), [-0.8728715, 1.0910894, -0.2182179]);
    close(whiten([2.75, 3.5, 3], one(3), { variance: 'population' }), [-1.0690449, 1.3363061, -0.2672613], 6);
    close(whiten([1, 3], [1, 1]), [-Math.SQRT1_2, Math.SQRT1_2]);
    expect([...whiten([3, Number.NaN], [1, 0])]).toEqual([3, 0]);
    expect([...whiten([Number.NaN, 1], [0, 0])]).toEqual([0, 0]);
  });

  it('whitened numbers have mean 0 and variance 1 over the batch as a whole, not per sequence', () => {
    const x = whiten([5, 6, 7, -3, -4], one(5));
    expect(x.reduce((sum, v) => sum + v, 0)).toBeCloseTo(0, 12);
    expect(x.reduce((sum, v) => sum + v * v, 0) / 4).toBeCloseTo(1, 8);
    expect(x[0]! + x[1]! + x[2]!).toBeGreaterThan(1);
  });

  it('explained variance is 1 for perfect values, 0 for constant ones, and 0 without two tokens', () => {
    const returns = [1, 2, 3, Number.NaN];
    const mask = [1, 1, 1, 0];
    expect(explainedVariance(returns, returns, mask)).toBe(1);
    expect(explainedVariance([7, 7, 7, 0], returns, mask)).toBeCloseTo(0, 4);
    expect(explainedVariance([7], [1], [1])).toBe(0);
  });
});
