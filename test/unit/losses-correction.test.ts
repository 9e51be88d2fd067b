/** Laws of rollout correction: nothing to correct on one policy, bounds, normalisation, rejection. */
import { describe, expect, it } from 'vitest';
import { offPolicyMetrics } from '../../src/losses/off-policy.js';
import {
  type CorrectionName,
  corrections,
  correctionWeights,
  rejectionMask,
} from '../../src/losses/rollout-correction.js';

const nan = Number.NaN;
const names = Object.keys(corrections) as CorrectionName[];
const lengths = [3, 0, 2, 1];
const mask = [1, 0, 1, 1, 1, 0];
const learned = [0, 2, 3, 4];
const old = [-1, nan, -2, -0.5, -3, nan];
const of = (logRatios: number[]) => ({
  lengths,
  mask,
  oldLogprobs: old,
  rolloutLogprobs: old.map((x, t) => x - logRatios[t]!),
});
const same = of([0, 0, 0, 0, 0, 0]);
const logs = (ratios: number[]) => of(ratios.map(Math.log));

describe('on one policy', () => {
  for (const rule of names) {
    for (const level of ['token', 'sequence'] as const) {
      it(`${rule} by ${level} has weights of exactly 1`, () => {
        const { weights, statistics } = correctionWeights(same, { rule, level, normalize: true });
        expect([...weights]).toEqual(mask);
        expect(statistics).toEqual({
          mean: 1,
          max: 1,
          min: 1,
          zeroFraction: 0,
          effectiveSampleSize: 1,
          maxRatio: 1,
          minRatio: 1,
          highFraction: 0,
          lowFraction: 0,
          normalizer: 1,
        });
      });
    }
  }

  it('nothing is rejected, and no divergence is measured', () => {
    const rejections = (['token', 'sum', 'mean', 'max'] as const).map(
      (over) => ({ estimator: 'k3', over, high: 0 }) as const,
    );
    expect(rejectionMask(same, rejections)).toEqual({
      mask: Float64Array.from(mask),
      rejectedFraction: 0,
      rejectedSequences: 0,
    });
    const metrics = offPolicyMetrics(same);
    expect(metrics).toMatchObject({ k3: 0, logPerplexityDifference: 0, perplexityRatio: 1 });
    expect(metrics).toMatchObject({ chiSquareToken: 0, chiSquareSequence: 0 });
    expect(metrics.kl).toBeCloseTo(0, 15);
    expect(metrics.trainingLogPerplexity).toBeCloseTo((1.5 + 1.75) / 2, 15);
  });
});

describe('importance weights', () => {
  const far = logs([4, 1, 0.1, 1, 0.8, 1]);

  it('by token: cut off, or left out beyond the bounds', () => {
    const weights = (rule: CorrectionName, low?: number) =>
      [...correctionWeights(far, { rule, low, high: 2 }).weights].map((x) => Number(x.toFixed(12)));
    expect(weights('tis')).toEqual([2, 0, 0.1, 1, 0.8, 0]);
    expect(weights('tis', 0.5)).toEqual([2, 0, 0.5, 1, 0.8, 0]);
    expect(weights('icepop')).toEqual([0, 0, 0.1, 1, 0.8, 0]);
    expect(weights('icepop', 0.5)).toEqual([0, 0, 0, 1, 0.8, 0]);
    // Geometric means: √0.4 and √0.8.
    expect(weights('sequence-mask', 0.7)).toEqual([0, 0, 0, 1, 0.8, 0]);
    expect(weights('sequence-mask', 0.6)).toEqual([4, 0, 0.1, 1, 0.8, 0]);
  });

  it('by sequence: the product of its ratios at each of its tokens', () => {
    const { weights, statistics } = correctionWeights(far, { rule: 'tis', level: 'sequence', high: 0.5 });
    [0.4, 0, 0.4, 0.5, 0.5, 0].forEach((want, t) => {
      expect(weights[t]).toBeCloseTo(want, 12);
    });
    expect(statistics.maxRatio).toBeCloseTo(0.8, 12);
    expect(statistics.highFraction).toBe(0.5);
    // Below 1 / high = 2 where there is no lower bound.
    expect(statistics.lowFraction).toBe(1);
    const all = correctionWeights(far, { rule: 'tis', level: 'sequence', high: 0.5, sequences: 'all' });
    expect(all.statistics.maxRatio).toBe(1);
    expect(all.statistics.highFraction).toBe(0.75);
  });

  it('have mean 1 when they are normalised, over tokens or over sequences; all 0 they stay 0', () => {
    const tokens = correctionWeights(far, { rule: 'tis', normalize: true });
    expect(tokens.weights.reduce((sum, x) => sum + x) / learned.length).toBeCloseTo(1, 14);
    const sequences = correctionWeights(far, { rule: 'tis', level: 'sequence', normalize: true }).weights;
    expect((sequences[0]! + sequences[3]!) / 2).toBeCloseTo(1, 14);
    const none = correctionWeights(far, { rule: 'icepop', low: 50, high: 60, normalize: true });
    expect([...none.weights]).toEqual([0, 0, 0, 0, 0, 0]);
    expect(none.statistics).toMatchObject({ zeroFraction: 1, effectiveSampleSize: 0, normalizer: 1 });
  });

  it('of nothing learned are nothing', () => {
    const nothing = { ...same, mask: mask.map(() => 0) };
    expect(correctionWeights(nothing, { rule: 'tis' }).statistics).toMatchObject({
      mean: 0,
      max: 0,
      min: 0,
      maxRatio: 0,
    });
    expect(rejectionMask(nothing, [{ estimator: 'k2', over: 'max', high: 0 }]).rejectedFraction).toBe(0);
    expect(offPolicyMetrics(nothing)).toMatchObject({ kl: 0, chiSquareToken: 0, chiSquareSequence: 0 });
  });
});

describe('rejection', () => {
  const far = of([1, nan, -0.2, 0.1, 0.1, nan]);
  const kept = (...rejections: Parameters<typeof rejectionMask>[1]) => [...rejectionMask(far, rejections).mask];

  it('by token, and by the sum, mean and largest of a sequence', () => {
    expect(kept({ estimator: 'k2', over: 'token', high: 0.1 })).toEqual([0, 0, 1, 1, 1, 0]);
    // k2 of the first sequence: 0.5 and 0.02.
    expect(kept({ estimator: 'k2', over: 'sum', high: 0.51 })).toEqual([0, 0, 0, 1, 1, 0]);
    expect(kept({ estimator: 'k2', over: 'mean', high: 0.27 })).toEqual(mask);
    expect(kept({ estimator: 'k2', over: 'max', high: 0.49 })).toEqual([0, 0, 0, 1, 1, 0]);
  });

  it('by k1 has two sides, in nats of π_rollout over π_old', () => {
    expect(kept({ estimator: 'k1', over: 'token', low: -0.5, high: 0.15 })).toEqual([0, 0, 0, 1, 1, 0]);
    expect(kept({ estimator: 'k1', over: 'token', high: 0.15 })).toEqual([1, 0, 0, 1, 1, 0]);
  });

  it('keeps what passes every rule, and counts the rest', () => {
    const rules = [
      { estimator: 'k2', over: 'token', high: 0.1 },
      { estimator: 'k1', over: 'token', high: 0.15 },
    ] as const;
    expect(kept(...rules)).toEqual([0, 0, 0, 1, 1, 0]);
    expect(rejectionMask(far, rules)).toMatchObject({ rejectedFraction: 0.5, rejectedSequences: 1 });
    expect(rejectionMask(far, [])).toMatchObject({ rejectedFraction: 0, rejectedSequences: 0 });
  });

  it('bounds log ratios before it looks', () => {
    const extreme = of([30, nan, 0, 0, 0, nan]);
    const rule = { estimator: 'k2', over: 'token', high: 200 } as const;
    expect(rejectionMask(extreme, [rule]).rejectedFraction).toBe(0.25);
    expect(rejectionMask(extreme, [rule], { logRatioBound: 20 }).rejectedFraction).toBe(0);
  });
});

describe('off-policy metrics', () => {
  it('count an empty sequence as one of log-probs 0 when all are asked for', () => {
    const far = of([0.3, nan, 0.1, -0.2, 0.4, nan]);
    const [own, all] = [offPolicyMetrics(far), offPolicyMetrics(far, { sequences: 'all' })];
    expect(all.trainingLogPerplexity).toBeCloseTo(own.trainingLogPerplexity / 2, 14);
    expect(all.trainingPerplexity).toBeCloseTo((own.trainingPerplexity + 1) / 2, 14);
    expect(all.kl).toBe(own.kl);
    expect(own.kl).toBeCloseTo(-0.15, 14);
    expect(own.chiSquareSequence).toBeCloseTo((Math.exp(0.8) + Math.exp(0.4)) / 2 - 1, 14);
  });
});
