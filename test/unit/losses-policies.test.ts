/** Laws of the policy losses by name: gradients, micro-batches, weights, what they are on the policy that sampled. */
import { describe, expect, it } from 'vitest';
import type { AggregationMode } from '../../src/losses/aggregation.js';
import { evaluateLoss, type Loss, type LossBatch, totalsOf } from '../../src/losses/loss.js';
import { selectForClip, selectForKl } from '../../src/losses/policy-covariance.js';
import { type PolicyLossName, policyLosses } from '../../src/losses/policy-losses.js';
import { addTotals } from '../../src/losses/selection.js';
import { differences, expectSame } from './finite-differences.js';

const nan = Number.NaN;
const lengths = [3, 0, 1, 4];
const mask = [1, 0, 1, 0, 1, 1, 0, 1];
const logprobs = [-0.31, nan, -1.27, nan, -0.74, -2.13, nan, -0.43];
// log π − log π_old lies on both sides of every bound below, none within 10 h of one.
const shift = [-0.5, 0, 0.05, 0, 0.4, -0.1, 0, 0.9];
const advantages = [1.2, nan, -0.7, nan, -2.0, 0.9, nan, -1.5];
const batch: LossBatch = {
  lengths,
  mask,
  columns: {
    oldLogprobs: logprobs.map((x, t) => x - shift[t]!),
    referenceLogprobs: [-0.9, nan, -1.0, nan, -0.1, -2.6, nan, -0.8],
    advantages,
    weights: [0.5, nan, 2, nan, 1.3, 0, nan, 0.7],
    selected: [1, nan, 0, nan, 0, 0, nan, 1],
  },
};
const outputs = { logprobs, entropies: [1.1, nan, 0.3, nan, 2.2, 0.6, nan, 1.9] };

type Terms = Parameters<typeof policyLosses.reinforce>[0];
/** Every loss with settings that reach all of its branches at these points. */
const losses: Record<PolicyLossName, (terms?: Terms) => Loss> = {
  ppo: (terms) => policyLosses.ppo({ clip: 0.2, clipHigh: 0.3, ...terms }),
  gspo: (terms) => policyLosses.gspo({ clip: 0.2, ...terms }),
  gmpo: (terms) => policyLosses.gmpo({ clip: 0.2, clipHigh: 0.3, ...terms }),
  rloo: (terms) => policyLosses.rloo({ clip: 0.6, ...terms }),
  cispo: (terms) => policyLosses.cispo({ clip: 0.2, clipHigh: 0.28, ...terms }),
  sapo: (terms) => policyLosses.sapo(terms),
  reinforce: (terms) => policyLosses.reinforce(terms),
  gpg: (terms) => policyLosses.gpg(terms),
  dppo: (terms) => policyLosses.dppo({ clip: 0.2, ratioCap: 1.3, ...terms }),
  dro: (terms) => policyLosses.dro({ beta: 0.1, ...terms }),
  'clip-cov': (terms) => policyLosses['clip-cov']({ clip: 0.2, ...terms }),
  'kl-cov': (terms) => policyLosses['kl-cov']({ coefficient: 0.5, ...terms }),
  'bypass-reinforce': (terms) => policyLosses['bypass-reinforce']({ rule: 'tis', high: 1.3, ...terms }),
};
const names = Object.keys(losses) as PolicyLossName[];
/** Their ratio stands behind a stopped gradient: the derivative is not that of the value. */
const stopped: readonly PolicyLossName[] = ['cispo', 'dppo', 'bypass-reinforce'];

describe('the gradient of a policy loss is its finite difference', () => {
  const terms: Record<string, Terms> = {
    alone: {},
    'with weights': { weighted: true },
    'with entropy bonus and KL': { entropyCoefficient: 0.1, kl: { coefficient: 0.3, estimator: 'k3' } },
    'summed and normalised': { aggregation: { mode: 'seq-mean-token-sum-norm', horizon: 5, sequences: 'all' } },
  };
  for (const name of names.filter((each) => !stopped.includes(each))) {
    for (const [what, settings] of Object.entries(terms)) {
      it(`${name}, ${what}`, () => {
        const loss = losses[name](settings);
        const result = evaluateLoss(loss, batch, outputs);
        for (const output of ['logprobs', 'entropies'] as const) {
          const gradient = result.gradients[output];
          if (!gradient) continue;
          const value = (x: number[]) => evaluateLoss(loss, batch, { ...outputs, [output]: x }).loss;
          const difference = differences(value, outputs[output], mask);
          expect(difference.some((x) => x !== 0)).toBe(true);
          expectSame(gradient, difference);
        }
        expect(result.gradients.entropies === undefined).toBe(settings?.entropyCoefficient === undefined);
      });
    }
  }

  const ratios = shift.map(Math.exp);
  const closed: Record<string, (t: number) => number> = {
    cispo: (t) => Math.min(Math.max(ratios[t]!, 0.8), 1.28),
    // Dropped: A and p − p_old have one sign and |p − p_old| > 0.2; at these points no token.
    dppo: (t) => Math.min(ratios[t]!, 1.3),
    'bypass-reinforce': (t) => Math.min(ratios[t]!, 1.3),
  };
  for (const name of stopped) {
    it(`${name}: −w A at every token, w a constant`, () => {
      const { gradients } = evaluateLoss(losses[name]({ aggregation: { mode: 'token-sum' } }), batch, outputs);
      expectSame(
        gradients.logprobs!,
        mask.map((learned, t) => (learned ? -closed[name]!(t) * advantages[t]! : 0)),
      );
    });
  }
});

describe('a policy loss over micro-batches', () => {
  const cut = <T>(x: readonly T[], part: number) => (part === 0 ? x.slice(0, 3) : x.slice(3));
  const parts = [0, 1].map((part) => ({
    batch: {
      lengths: part === 0 ? [3] : [0, 1, 4],
      mask: cut(mask, part),
      columns: Object.fromEntries(
        Object.entries(batch.columns).map(([name, column]) => [name, cut(Array.from(column), part)]),
      ),
    },
    outputs: { logprobs: cut(logprobs, part), entropies: cut(outputs.entropies, part) },
  }));
  const totals = addTotals(parts.map((part) => totalsOf(part.batch)));
  const modes: AggregationMode[] = ['token-mean', 'seq-mean-token-mean', 'seq-mean-token-sum'];
  for (const name of names) {
    it(`${name} adds up to that of the mini-batch, statistics and gradients too`, () => {
      for (const mode of modes) {
        const loss = losses[name]({ aggregation: { mode }, weighted: true, entropyCoefficient: 0.1 });
        const whole = evaluateLoss(loss, batch, outputs);
        const [first, second] = parts.map((part) => evaluateLoss(loss, part.batch, part.outputs, totals));
        expect(first!.loss + second!.loss).toBeCloseTo(whole.loss, 13);
        for (const [statistic, value] of Object.entries(whole.statistics)) {
          expect(first!.statistics[statistic]! + second!.statistics[statistic]!).toBeCloseTo(value, 13);
        }
        expect([...first!.gradients.logprobs!, ...second!.gradients.logprobs!]).toEqual([...whole.gradients.logprobs!]);
      }
    });
  }
});

describe('on the policy that sampled', () => {
  const same = { ...batch, columns: { ...batch.columns, oldLogprobs: logprobs, selected: mask.map(() => 0) } };
  const gradient = (loss: Loss, of: LossBatch) => [...evaluateLoss(loss, of, outputs).gradients.logprobs!];
  const tokens: PolicyLossName[] = [
    'ppo',
    'cispo',
    'sapo',
    'gpg',
    'dppo',
    'dro',
    'clip-cov',
    'kl-cov',
    'bypass-reinforce',
  ];
  for (const name of tokens) {
    it(`${name} has the gradient of REINFORCE`, () => {
      const aggregation = { mode: 'token-mean' } as const;
      expectSame(gradient(losses[name]({ aggregation }), same), gradient(losses.reinforce({ aggregation }), same));
    });
  }

  // Losses of sequences: with one advantage per sequence, the mean of a sequence's tokens or their sum.
  const perSequence = [1.2, nan, 1.2, nan, -2, -2, nan, -2];
  const constant = { ...same, columns: { ...same.columns, advantages: perSequence } };
  for (const [name, mode] of [
    ['gspo', 'seq-mean-token-mean'],
    ['gmpo', 'seq-mean-token-mean'],
    ['rloo', 'seq-mean-token-sum'],
  ] as const) {
    it(`${name} has the gradient of REINFORCE in ${mode}`, () => {
      expectSame(gradient(losses[name](), constant), gradient(losses.reinforce({ aggregation: { mode } }), constant));
    });
  }
});

describe('importance weights of a policy loss', () => {
  it('multiply the surrogate alone', () => {
    const doubled = { ...batch, columns: { ...batch.columns, weights: mask.map(() => 2) } };
    const kl = { coefficient: 0.3, estimator: 'k2' } as const;
    for (const name of names) {
      const plain = evaluateLoss(losses[name]({ kl }), doubled, outputs);
      const weighted = evaluateLoss(losses[name]({ kl, weighted: true }), doubled, outputs);
      expect(weighted.loss - plain.loss).toBeCloseTo(plain.statistics.policyLoss!, 12);
      expect(plain.statistics.policyLoss).not.toBe(0);
    }
  });

  it('leave out a token of weight 0 whose surrogate is infinite', () => {
    const far = {
      lengths: [2],
      mask: [1, 1],
      columns: { oldLogprobs: [-900, -1], advantages: [-1, 1], weights: [0, 1] },
    };
    const values = { logprobs: [-1, -1], entropies: [0, 0] };
    const { loss, gradients } = evaluateLoss(losses.ppo({ weighted: true }), far, values);
    expect(loss).toBe(-0.5);
    expect([...gradients.logprobs!]).toEqual([0, -0.5]);
    expect(evaluateLoss(losses.ppo(), far, values).loss).toBe(Infinity);
  });

  it('are asked for as a column', () => {
    const { weights: _, ...columns } = batch.columns;
    expect(() => evaluateLoss(losses.gspo({ weighted: true }), { ...batch, columns }, outputs)).toThrow(/"weights"/);
    expect(evaluateLoss(losses.gspo(), { ...batch, columns }, outputs).loss).not.toBeNaN();
  });
});

describe('published values', () => {
  const columns = { advantages: [1, -1, 2], oldLogprobs: [-1, -1, -1] };
  const current = { logprobs: [-1.69315, -1, -0.59453], entropies: [0, 0, 0] };
  const run = (loss: Loss, weights: number[] = []) =>
    evaluateLoss(loss, { lengths: [3], mask: [1, 1, 1], columns: { ...columns, weights } }, current).loss;
  const aggregation = { mode: 'token-mean' } as const;

  it('of GSPO, CISPO and truncated importance sampling', () => {
    expect(run(policyLosses.gspo({ clip: 0.2 }))).toBeCloseTo(-0.6057073, 6);
    expect(run(policyLosses.cispo({ clip: 0.2 }))).toBeCloseTo(0.5937973, 6);
    const weights = [0.6065307, 1.6487213, 0.8187308];
    const capped = weights.map((weight) => Math.min(weight, 0.8));
    expect(run(policyLosses.ppo({ clip: 0.2, weighted: true, aggregation }), weights)).toBeCloseTo(-0.206499, 6);
    expect(run(policyLosses.ppo({ clip: 0.2, weighted: true, aggregation }), capped)).toBeCloseTo(-0.4744215, 6);
    expect(run(policyLosses.gspo({ clip: 0.2, weighted: true }), [0.8, 0.8, 0.8])).toBeCloseTo(-0.4845658, 6);
  });
});

describe('DPPO', () => {
  const of = (logprob: number, old: number, advantage: number, divergence: 'tv' | 'kl') => {
    const columns = { oldLogprobs: [old], advantages: [advantage] };
    const { statistics, gradients } = evaluateLoss(
      policyLosses.dppo({ clip: 0.2, divergence, ratioCap: 2 }),
      { lengths: [1], mask: [1], columns },
      { logprobs: [logprob], entropies: [0] },
    );
    return { dropped: statistics.clipFraction, capped: statistics.cappedFraction, gradient: gradients.logprobs![0] };
  };

  it('leaves a token out only where the advantage moves it further', () => {
    const [low, high] = [Math.log(0.1), Math.log(0.6)];
    for (const divergence of ['tv', 'kl'] as const) {
      expect(of(high, low, 1, divergence)).toEqual({ dropped: 1, capped: 0, gradient: 0 });
      expect(of(high, low, -1, divergence)).toEqual({ dropped: 0, capped: 1, gradient: 2 });
      expect(of(low, high, -1, divergence).dropped).toBe(1);
      expect(of(low, high, 1, divergence).dropped).toBe(0);
    }
  });

  it('has a binary KL at probabilities 0 and 1', () => {
    expect(of(0, 0, 1, 'kl').dropped).toBe(0);
    expect(of(-0.5, 0, -1, 'kl').dropped).toBe(1);
    expect(of(0, -1, 1, 'kl').dropped).toBe(1);
    expect(of(-1, -2000, 1, 'kl').dropped).toBe(1);
  });
});

describe('tokens of high covariance', () => {
  const inputs = { lengths, mask, logprobs, advantages, oldLogprobs: logprobs };
  const learned = [0, 2, 4, 5, 7];
  const mean = (x: ArrayLike<number>) => learned.reduce((sum, t) => sum + x[t]!, 0) / learned.length;

  it('for KL-Cov: those of the largest (A − mean A)(log π − mean log π) in the mini-batch, at least one', () => {
    const covariance = (t: number) => (advantages[t]! - mean(advantages)) * (logprobs[t]! - mean(logprobs));
    const order = [...learned].sort((a, b) => covariance(b) - covariance(a));
    const marked = (ratio: number) => {
      const marks = selectForKl(inputs, { ratio });
      return learned.filter((t) => marks[t]);
    };
    expect(marked(0.41)).toEqual(order.slice(0, 2).sort());
    expect(marked(0)).toEqual(order.slice(0, 1));
  });

  it('for Clip-Cov: drawn by the seed from those within the bounds that are not clipped', () => {
    const settings = { clip: 0.2, low: -Infinity, high: Infinity, ratio: 0.41, seed: 1 };
    const draws = Array.from({ length: 40 }, (_, seed) => [...selectForClip(inputs, { ...settings, seed })].join());
    expect(selectForClip(inputs, settings).join()).toBe(draws[1]);
    expect(new Set(draws).size).toBe(10);
    const all = selectForClip(inputs, { ...settings, ratio: 1 });
    expect(learned.filter((t) => all[t])).toEqual(learned);
    // Where log π rose by 0.5, tokens of a positive advantage are clipped.
    const risen = { ...inputs, oldLogprobs: logprobs.map((x) => x - 0.5) };
    const open = selectForClip(risen, { ...settings, ratio: 1 });
    expect(learned.filter((t) => open[t])).toEqual(learned.filter((t) => advantages[t]! < 0));
  });
});
