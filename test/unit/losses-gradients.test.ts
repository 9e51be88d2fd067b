/** The gradient of every operation and of every loss is its finite difference, at points away from kinks. */
import { describe, expect, it } from 'vitest';
import { type AggregationMode, aggregate } from '../../src/losses/aggregation.js';
import { importanceWeighted, type KlEstimator, klEstimate } from '../../src/losses/kl.js';
import { evaluateLoss, type Loss, type LossBatch, type OutputName } from '../../src/losses/loss.js';
import { policyLoss } from '../../src/losses/policy.js';
import { bradleyTerry, costModel } from '../../src/losses/reward-model.js';
import { select } from '../../src/losses/selection.js';
import { crossEntropy } from '../../src/losses/sft.js';
import { gradients, type Scalar, TokenArray } from '../../src/losses/tokens.js';
import { valueLoss } from '../../src/losses/value.js';
import { differences, expectSame } from './finite-differences.js';

const lengths = [3, 0, 1, 4];
const mask = [1, 0, 1, 0, 1, 1, 0, 1];
const a = [0.3, Number.NaN, -1.2, Number.NaN, 0.7, 2.1, Number.NaN, -0.4];
const b = [1.4, Number.NaN, -0.5, Number.NaN, 0.2, 3.3, Number.NaN, 0.9];

describe('the gradient of an operation is its finite difference', () => {
  const positive = (x: TokenArray) => x.square().plus(0.5);
  const operations: Record<string, (x: TokenArray, y: TokenArray) => TokenArray> = {
    exp: (x) => x.exp(),
    log: (x) => positive(x).log(),
    negate: (x) => x.negate(),
    square: (x) => x.square(),
    abs: (x) => x.abs(),
    sigmoid: (x) => x.sigmoid(),
    logSigmoid: (x) => x.logSigmoid(),
    plus: (x, y) => x.plus(y),
    minus: (x, y) => x.minus(y),
    times: (x, y) => x.times(y),
    divide: (x, y) => x.divide(positive(y)),
    min: (x, y) => x.min(y),
    max: (x, y) => x.max(y),
    'clip by numbers': (x) => x.clip(-1, 1),
    'clip by arrays': (x, y) => x.clip(y.minus(0.4), y.plus(0.3)),
    where: (x, y) => x.square().where(y.greaterThan(0.5), y.times(3)),
    'one value used twice': (x) => x.times(x.exp()).plus(x),
    'sum by sequence, over tokens': (x) => x.square().sumBySequence().exp().overTokens().times(x),
    'mean by sequence, over tokens': (x) => x.meanBySequence().square().overTokens().times(x),
  };
  for (const [name, operation] of Object.entries(operations)) {
    it(name, () => {
      const selection = select(lengths, mask);
      const weights = TokenArray.constant(selection, [1, 0, -2, 0, 0.5, 3, 0, 1.5]);
      const f = (x: TokenArray, y: TokenArray): Scalar => operation(x, y).times(weights).sum();
      const [x, y] = [TokenArray.leaf(selection, a), TokenArray.leaf(selection, b)];
      const [dx, dy] = gradients(f(x, y), [x, y]);
      const value = (p: number[], q: number[]) => f(TokenArray.leaf(selection, p), TokenArray.leaf(selection, q)).value;
      expectSame(
        dx!,
        differences((p) => value(p, b), a, mask),
      );
      if (operation.length > 1)
        expectSame(
          dy!,
          differences((q) => value(a, q), b, mask),
        );
    });
  }

  it('gather, where a sequence is taken twice', () => {
    const selection = select(lengths, mask);
    const f = (x: TokenArray) => x.sumBySequence().gather([3, 0, 3]).square().sum();
    const x = TokenArray.leaf(selection, a);
    expectSame(
      gradients(f(x), [x])[0]!,
      differences((p) => f(TokenArray.leaf(selection, p)).value, a, mask),
    );
  });
});

describe('the gradient of a loss is its finite difference', () => {
  const logprobs = [-0.31, Number.NaN, -1.27, Number.NaN, -0.74, -2.13, Number.NaN, -0.43];
  // log π − log π_old lies at −0.5, 0.05, 0.4, −0.1, 0.9: on both sides of both clips, none within 10 h of one.
  const shift = [-0.5, 0, 0.05, 0, 0.4, -0.1, 0, 0.9];
  const values = [0.5, Number.NaN, 2.0, Number.NaN, -1.0, 0.4, Number.NaN, 0.1];
  const batch: LossBatch = {
    lengths,
    mask,
    columns: {
      oldLogprobs: logprobs.map((x, t) => x - shift[t]!),
      referenceLogprobs: [-0.9, Number.NaN, -1.0, Number.NaN, -0.1, -2.6, Number.NaN, -0.8],
      advantages: [1.2, Number.NaN, -0.7, Number.NaN, -2.0, 0.9, Number.NaN, -1.5],
      oldValues: [0.1, Number.NaN, 1.9, Number.NaN, -0.3, 0.35, Number.NaN, 0.6],
      returns: [1.0, Number.NaN, 1.0, Number.NaN, 1.0, -0.7, Number.NaN, 0.2],
      margins: [0.3, Number.NaN, 0.1, Number.NaN, 0, 0.5, Number.NaN, 0],
      unsafe: [1, Number.NaN, 0, Number.NaN, -1, 1, Number.NaN, 0],
    },
  };
  const outputs = { logprobs, values, entropies: [1.1, Number.NaN, 0.3, Number.NaN, 2.2, 0.6, Number.NaN, 1.9] };
  const horizon = 5;
  const policy = { clip: 0.2, clipHigh: 0.3 };
  const losses: Record<string, Loss> = {
    'cross-entropy': crossEntropy(),
    'PPO policy': policyLoss(policy),
    'PPO policy with dual clip': policyLoss({ ...policy, dualClip: 1.3 }),
    'PPO policy with a bounded log ratio': policyLoss({ ...policy, clip: 0.6, logRatioBound: 0.45 }),
    'PPO policy with entropy bonus': policyLoss({ ...policy, entropyCoefficient: 0.1 }),
    value: valueLoss({ clip: 0.2 }),
    'unclipped value': valueLoss({}),
    'Bradley-Terry': bradleyTerry(),
    'Bradley-Terry with centering and regularization': bradleyTerry({ centering: 0.1, regularization: 0.2 }),
    'cost model': costModel(),
  };
  for (const mode of ['seq-mean-token-mean', 'seq-mean-token-sum', 'seq-mean-token-sum-norm'] as AggregationMode[]) {
    losses[`PPO policy, ${mode}`] = policyLoss({ ...policy, aggregation: { mode, horizon, sequences: 'all' } });
  }
  for (const estimator of ['k1', 'k2', 'k3', 'abs'] as KlEstimator[]) {
    losses[`PPO policy with ${estimator} KL`] = policyLoss({ ...policy, kl: { coefficient: 0.3, estimator } });
  }
  for (const [name, loss] of Object.entries(losses)) {
    it(name, () => {
      const result = evaluateLoss(loss, batch, outputs);
      const names = Object.keys(result.gradients) as OutputName[];
      expect(names.length).toBeGreaterThan(0);
      for (const output of names) {
        const value = (x: number[]) => evaluateLoss(loss, batch, { ...outputs, [output]: x }).loss;
        const difference = differences(value, outputs[output], mask);
        expect(difference.some((x) => x !== 0)).toBe(true);
        expectSame(result.gradients[output]!, difference);
      }
    });
  }

  it('importance-weighted k3', () => {
    const selection = select(lengths, mask);
    const column = (name: string) => TokenArray.constant(selection, batch.columns[name]!);
    const f = (x: TokenArray) => {
      const kl = klEstimate(x, column('referenceLogprobs'), 'k3');
      return aggregate(importanceWeighted(kl, x, column('oldLogprobs')), { mode: 'token-mean' });
    };
    const x = TokenArray.leaf(selection, logprobs);
    const difference = differences((p) => f(TokenArray.leaf(selection, p)).value, logprobs, mask);
    expectSame(gradients(f(x), [x])[0]!, difference);
  });
});

describe('branches at equality and beyond the finite', () => {
  const selection = select([2], [1, 1]);
  const derivative = (f: (x: TokenArray) => TokenArray, at: number[]) => {
    const x = TokenArray.leaf(selection, at);
    return Array.from(gradients(f(x).sum(), [x])[0]!);
  };

  it('min, max and clip pass the gradient to this at equality, abs has none at 0', () => {
    expect(derivative((x) => x.min(1), [1, 2])).toEqual([1, 0]);
    expect(derivative((x) => x.max(1), [1, 0])).toEqual([1, 0]);
    expect(derivative((x) => x.clip(-1, 1), [1, -1])).toEqual([1, 1]);
    expect(derivative((x) => x.abs(), [0, -2])).toEqual([0, -1]);
  });

  it('a branch that is not chosen gives no NaN, however large its derivative', () => {
    expect(derivative((x) => x.exp().min(2), [1000, 0])).toEqual([0, 1]);
    expect(derivative((x) => x.divide(x.minus(1)).where(x.greaterThan(1), x), [1, 2])).toEqual([1, -1]);
    expect(derivative((x) => x.log().where(x.greaterThan(0), 5), [0, 2])).toEqual([0, 0.5]);
  });

  it('a NaN that is learned stays visible through min, max and clip', () => {
    const x = TokenArray.leaf(selection, [Number.NaN, 1]);
    expect(x.min(0).sum().value).toBeNaN();
    expect(x.max(0).sum().value).toBeNaN();
    expect(TokenArray.constant(selection, [0, 0]).max(x).sum().value).toBeNaN();
    expect(x.clip(0, 1).sum().value).toBeNaN();
  });

  it('log-sigmoid neither overflows nor loses small differences', () => {
    const x = TokenArray.leaf(selection, [-800, 40]);
    expect(Array.from(x.logSigmoid().expand())).toEqual([-800, -Math.exp(-40)]);
  });

  it('a stopped gradient is none, and an output that the loss ignores has none', () => {
    const x = TokenArray.leaf(selection, [1, 2]);
    expect(gradients(x.stopGradient().square().sum(), [x])).toEqual([undefined]);
    const y = TokenArray.leaf(selection, [3, 4]);
    expect(gradients(y.sum(), [x, y])).toEqual([undefined, Float64Array.of(1, 1)]);
  });
});
