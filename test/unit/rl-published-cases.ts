/**
 * Checks of the literals that other projects' tests and papers print, by formula; policy losses and advantages of groups
 * have files of their own. A case is of the first formula whose `is` recognises its inputs.
 */

import { type GaeInputs, gae } from '../../src/losses/advantages.js';
import { type Aggregation, aggregate, meanOverTokens } from '../../src/losses/aggregation.js';
import { adaptiveKl } from '../../src/losses/controllers.js';
import { klEstimate, klPenalty } from '../../src/losses/kl.js';
import { combineAdvantages, lagrangeMultiplier } from '../../src/losses/lagrange.js';
import { evaluateLoss, type Loss } from '../../src/losses/loss.js';
import { preferenceLosses } from '../../src/losses/preference.js';
import { bradleyTerry } from '../../src/losses/reward-model.js';
import { select } from '../../src/losses/selection.js';
import { whiten } from '../../src/losses/statistics.js';
import { TokenArray } from '../../src/losses/tokens.js';
import { valueLoss } from '../../src/losses/value.js';
import { cosineLength } from '../../src/rewards/built-in/cosine.js';
import { repetitionOf } from '../../src/rewards/built-in/repetition.js';
import { categorical, categoricalKl } from '../categorical.js';
import { type Case, expectClose, type Json, number } from '../rl-fixtures.js';
import { groupFormulas } from './rl-published-groups.js';
import { bound, type Formula, has, numbers, ones, rowsAndMask, text } from './rl-published-inputs.js';
import { policyFormulas } from './rl-published-policies.js';

const formulas: Record<string, Formula> = {
  'KL in the reward': { is: (test) => has(test, 'score', 'k1', 'gamma'), check: checkKlInReward },
  'truncated GAE': { is: (test) => has(test, 'rewards', 'values', 'discounts'), check: checkTruncatedGae },
  GAE: { is: (test) => has(test, 'rewards', 'values', 'gamma'), check: checkGae },
  'entropy of logits': {
    is: (test) => has(test, 'logits', 'weights') && !has(test, 'advantages'),
    check: checkEntropyOfLogits,
  },
  'KL of logits': { is: (test) => has(test, 'p_logits', 'q_logits'), check: checkKlOfLogits },
  'adaptive controller': { is: (test) => has(test, 'current_kl', 'horizon'), check: checkController },
  'KL penalty': { is: (test) => has(test, 'log_probs', 'ref_log_probs', 'beta'), check: checkKlLoss },
  'KL estimators': { is: (test) => has(test, 'log_probs', 'ref_log_probs'), check: checkEstimators },
  'bias and deviation of KL estimators': { is: (test) => has(test, 'mu'), check: checkEstimatorTable },
  whitening: {
    is: ({ inputs, expected }) => 'whitened' in expected || ('returns' in inputs && 'bessel' in expected),
    check: checkWhitening,
  },
  aggregation: { is: (test) => has(test, 'losses') && !has(test, 'prompts'), check: checkAggregation },
  'clipped value': { is: (test) => has(test, 'values', 'old_values', 'returns'), check: checkClippedValue },
  'DPO, cDPO and IPO': { is: (test) => has(test, 'delta', 'beta'), check: checkPreferences },
  'Bradley-Terry': { is: (test) => has(test, 'difference', 'margin'), check: checkRewardPair },
  'repetition reward': { is: (test) => has(test, 'ids', 'ngram'), check: checkRepetition },
  'cosine length reward': { is: (test) => has(test, 'max_length', 'correct'), check: checkCosineLength },
  'PPO-Lagrangian': { is: (test) => has(test, 'costs', 'learning_rate'), check: checkLagrangian },
};

export const published: Record<string, Formula> = { ...policyFormulas, ...groupFormulas, ...formulas };

function checkKlInReward(test: Case): void {
  const { inputs, expected } = test;
  const k1 = numbers(test, 'k1');
  const mask = ones(k1.length);
  const whole = { lengths: [k1.length], mask };
  const zeros = k1.map(() => 0);
  const scores = k1.map((_, t) => (t === k1.length - 1 ? number(inputs.score) : 0));
  const advantages = (coefficient: number) => {
    const settings = { coefficient, estimator: 'k1' } as const;
    const { rewards } = klPenalty({ ...whole, scores, logprobs: k1, reference: zeros }, settings);
    const discounts = { gamma: number(inputs.gamma), lambda: number(inputs.lambda) };
    return gae({ ...whole, rewards, values: zeros }, discounts).advantages;
  };
  expectClose(advantages(number(inputs.beta)), expected.advantages!, bound(test));
  expectClose(advantages(0), expected.without_kl!, bound(test));
}

/** A discount of 0 ends an episode; the discounts of a row that are not 0 are its γ. */
function checkTruncatedGae(test: Case): void {
  const { inputs, expected } = test;
  const discounts = inputs.discounts as number[][];
  const values = inputs.values as number[][];
  discounts.forEach((row, b) => {
    const gamma = Math.max(...row);
    const ends = row.flatMap((discount, t) => (discount === 0 || t === row.length - 1 ? [t + 1] : []));
    const batch: GaeInputs = {
      lengths: ends.map((end, i) => end - (ends[i - 1] ?? 0)),
      mask: ones(row.length),
      rewards: (inputs.rewards as number[][])[b]!,
      values: values[b]!.slice(0, row.length),
      bootstrap: ends.map((end) => (row[end - 1] === 0 ? 0 : values[b]![end]!)),
    };
    const { advantages } = gae(batch, { gamma, lambda: number(inputs.lambda) });
    expectClose(advantages, (expected.advantages as Json[])[b]!, bound(test));
  });
}

function checkGae(test: Case): void {
  const { inputs, expected } = test;
  const rewards = numbers(test, 'rewards');
  const mask = inputs.mask ? numbers(test, 'mask') : ones(rewards.length);
  const discounts = { gamma: number(inputs.gamma), lambda: number(inputs.lambda) };
  const batch = { lengths: [rewards.length], rewards, values: numbers(test, 'values') };
  const { advantages, returns } = gae({ ...batch, mask }, discounts);
  // What the mask leaves out is null in a case, or has a number that only a recursion without the mask gives it.
  const expectLearned = (actual: Float64Array, wanted: Json | undefined) => {
    if (wanted === undefined) return;
    const learned = (_: unknown, t: number) => mask[t] === 1;
    expectClose(actual.filter(learned), (wanted as Json[]).filter(learned), bound(test));
  };
  expectLearned(advantages, expected.advantages ?? expected.skip_gap_advantages);
  expectLearned(returns, expected.returns);
  const unmasked = gae({ ...batch, mask: ones(rewards.length) }, discounts).advantages;
  expectLearned(whiten(unmasked, mask), expected.whitened);
  expectLearned(unmasked, expected.buggy);
}

function checkEntropyOfLogits(test: Case): void {
  const rows = test.inputs.logits as number[][];
  const weights = numbers(test, 'weights');
  const losses = [0, 1].map((shift) => {
    const terms = rows.map((logits, t) => {
      const { entropy } = categorical(logits.map((logit) => logit + shift));
      return -(weights[t]! - shift) * entropy;
    });
    return terms.reduce((sum, term) => sum + term, 0) / terms.length;
  });
  expectClose(losses, test.expected.losses!, bound(test));
}

function checkKlOfLogits(test: Case): void {
  const [p, q] = [test.inputs.p_logits as number[][], test.inputs.q_logits as number[][]];
  const divergences = p.map((logits, i) => categoricalKl(categorical(logits), categorical(q[i]!)).kl);
  expectClose(divergences, test.expected.kl!, bound(test));
}

function checkController(test: Case): void {
  const { initial, target, horizon, current_kl: kl, n_steps: sequences } = test.inputs;
  const controller = adaptiveKl({ coefficient: number(initial), target: number(target), horizon: number(horizon) });
  controller.update(number(kl), number(sequences));
  expectClose(controller.coefficient, test.expected.value!, bound(test));
}

function logRatios(test: Case): { logprobs: TokenArray; reference: TokenArray } {
  const logprobs = numbers(test, 'log_probs');
  const selection = select([logprobs.length], ones(logprobs.length));
  const constant = (x: number[]) => TokenArray.constant(selection, x);
  return { logprobs: constant(logprobs), reference: constant(numbers(test, 'ref_log_probs')) };
}

function checkKlLoss(test: Case): void {
  const { logprobs, reference } = logRatios(test);
  const mean = meanOverTokens(klEstimate(logprobs, reference, 'k3'));
  expectClose(mean.value * number(test.inputs.beta), test.expected.value!, bound(test));
}

function checkEstimators(test: Case): void {
  const { logprobs, reference } = logRatios(test);
  const { k1, k2, k3, k3_clamped: clamped } = test.expected;
  expectClose(klEstimate(logprobs, reference, 'k1').data, k1!, bound(test));
  expectClose(klEstimate(logprobs, reference, 'k2').data, k2!, bound(test));
  expectClose(klEstimate(logprobs, reference, 'k3').data, k3!, bound(test));
  expectClose(klEstimate(logprobs, reference, 'k3', { input: 20, output: 10 }).data, clamped!, bound(test));
}

/** Means over x ~ N(0, 1) by the trapezoidal rule, against N(μ, 1). */
function checkEstimatorTable(test: Case): void {
  const step = 0.01;
  const x = Array.from({ length: 3001 }, (_, i) => -15 + i * step);
  const density = x.map((at) => (step * Math.exp(-(at ** 2) / 2)) / Math.sqrt(2 * Math.PI));
  const selection = select([x.length], ones(x.length));
  const weights = TokenArray.constant(selection, density);
  const logDensity = (mean: number) =>
    TokenArray.constant(
      selection,
      x.map((at) => -((at - mean) ** 2) / 2),
    );
  for (const mu of numbers(test, 'mu')) {
    const divergence = mu ** 2 / 2;
    const [, wanted] = Object.entries(test.expected).find(([key]) => Number(key) === mu)!;
    for (const [estimator, row] of Object.entries(wanted as Record<string, Json>)) {
      const k = klEstimate(logDensity(0), logDensity(mu), estimator as 'k1' | 'k2' | 'k3');
      const mean = k.times(weights).sum().value;
      const deviation = Math.sqrt(k.minus(mean).square().times(weights).sum().value);
      expectClose([mean / divergence - 1, deviation / divergence], row, bound(test));
    }
  }
}

function checkWhitening(test: Case): void {
  const x = numbers(test, 'returns' in test.inputs ? 'returns' : 'values');
  const { whitened, bessel = whitened, population } = test.expected;
  expectClose(whiten(x, ones(x.length)), bessel!, bound(test));
  if (population) expectClose(whiten(x, ones(x.length), { variance: 'population' }), population, bound(test));
}

function checkAggregation(test: Case): void {
  const { inputs, expected } = test;
  const { lengths, mask } = rowsAndMask(test, 'losses');
  const selection = select(lengths, mask);
  const aggregation: Aggregation =
    inputs.horizon !== undefined
      ? { mode: 'seq-mean-token-sum-norm', horizon: number(inputs.horizon), sequences: 'all' }
      : { mode: /sequence/.test(text(test)) ? 'seq-mean-token-mean' : 'token-mean' };
  const value = aggregate(TokenArray.leaf(selection, numbers(test, 'losses')), aggregation).value;
  expectClose(value, expected.value!, bound(test));
}

function checkClippedValue(test: Case): void {
  const loss = valueLoss({ clip: number(test.inputs.clip) });
  const [values, oldValues, returns] = ['values', 'old_values', 'returns'].map((name) => numbers(test, name));
  const evaluate = (begin: number, end: number) => {
    const cut = (x: number[] | undefined) => x!.slice(begin, end);
    const columns = { oldValues: cut(oldValues), returns: cut(returns) };
    const batch = { lengths: [end - begin], mask: ones(end - begin), columns };
    return evaluateLoss(loss, batch, { values: cut(values) }).loss;
  };
  const squares = values!.map((_, t) => 2 * evaluate(t, t + 1));
  expectClose(squares, test.expected.tokens!, bound(test));
  expectClose(evaluate(0, values!.length), test.expected.loss!, bound(test));
}

function checkPreferences(test: Case): void {
  const { inputs, expected } = test;
  const beta = number(inputs.beta);
  const labelSmoothing = number(inputs.label_smoothing);
  const evaluate = (loss: Loss, delta: number) => {
    const batch = { lengths: [1, 1], mask: [1, 1], columns: { referenceLogprobs: [-4, -4] } };
    return evaluateLoss(loss, batch, { logprobs: [delta - 5, -5] }).loss;
  };
  const delta = number(inputs.delta);
  expectClose(evaluate(preferenceLosses.dpo({ beta }), 0), expected.at_zero!, bound(test));
  expectClose(evaluate(preferenceLosses.dpo({ beta }), delta), expected.dpo!, bound(test));
  expectClose(evaluate(preferenceLosses.dpo({ beta, labelSmoothing }), delta), expected.cdpo!, bound(test));
  expectClose(evaluate(preferenceLosses.ipo({ beta }), delta), expected.ipo!, bound(test));
}

function checkRewardPair(test: Case): void {
  const evaluate = (margin: number) => {
    const batch = { lengths: [1, 1], mask: [1, 1], columns: { margins: [margin, 0] } };
    return evaluateLoss(bradleyTerry(), batch, { values: [number(test.inputs.difference), 0] }).loss;
  };
  expectClose(evaluate(0), test.expected.plain!, bound(test));
  expectClose(evaluate(number(test.inputs.margin)), test.expected.with_margin!, bound(test));
}

function checkLagrangian(test: Case): void {
  const { initial, learning_rate: learningRate, threshold } = test.inputs;
  const lagrange = lagrangeMultiplier({
    initial: number(initial),
    learningRate: number(learningRate),
    threshold: number(threshold),
    window: 1,
  });
  for (const cost of numbers(test, 'costs')) lagrange.update([cost]);
  expectClose(lagrange.multiplier, test.expected.lambda!, bound(test));
  const [reward, cost, lambda] = numbers(test, 'advantage');
  expectClose(combineAdvantages([reward!], [cost!], lambda!), [test.expected.advantage!], bound(test));
}

/** The built-in reward is the penalty of weight 1. */
function checkRepetition(test: Case): void {
  const repeated = repetitionOf(numbers(test, 'ids'), number(test.inputs.ngram));
  expectClose(-number(test.inputs.penalty) * repeated, test.expected.value!, bound(test));
}

/** From 1 to ½ for correct answers, from −1 to −½ for wrong ones. */
function checkCosineLength(test: Case): void {
  const correct = numbers(test, 'correct');
  const values = numbers(test, 'lengths').map((tokens, i) =>
    cosineLength(tokens, number(test.inputs.max_length), correct[i] ? [1, 0.5] : [-1, -0.5]),
  );
  expectClose(values, test.expected.values!, bound(test));
}
