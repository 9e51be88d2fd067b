/** Checks of published literals of advantages without a critic, of means over prompts and of DAPO's punishment. */
import { overlongPenalties } from '../../src/data/overlong.js';
import {
  type GroupAdvantageName,
  type GroupAdvantageSettings,
  type Groups,
  groupAdvantages,
  overTokens,
  promptMeanWeights,
  returnsToGo,
} from '../../src/losses/group-advantages.js';
import { klPenalty } from '../../src/losses/kl.js';
import { evaluateLoss } from '../../src/losses/loss.js';
import { policyLosses } from '../../src/losses/policy-losses.js';
import { remaxReturns } from '../../src/losses/token-baselines.js';
import { type Case, expectClose, flat, type Json, number } from '../rl-fixtures.js';
import { bound, expectPrinted, type Formula, has, numbers, ones, rowsAndMask, text } from './rl-published-inputs.js';

export const groupFormulas: Record<string, Formula> = {
  'mean and deviation of the others': {
    is: (test) => 'baseline' in test.expected && (has(test, 'scores') || has(test, 'groups')),
    check: checkOthers,
  },
  'advantages of groups': { is: (test) => has(test, 'groups') || has(test, 'scores'), check: checkGroups },
  'GRPO of groups with an epsilon each': {
    is: (test) => /grpo/.test(text(test)) && epsilons(test).length > 0,
    check: checkEpsilons,
  },
  ReMax: { is: (test) => has(test, 'score', 'greedy', 'kl', 'beta'), check: checkRemax },
  'mean over prompts': { is: (test) => has(test, 'losses', 'prompts'), check: checkPromptMean },
  'overlong punishment': { is: (test) => has(test, 'lengths', 'max_length', 'cache'), check: checkOverlong },
};

/** Rows of scores as sequences of numbered groups. */
const grouped = (rows: number[][]): Groups => ({
  scores: rows.flat(),
  groups: rows.flatMap((row, g) => row.map(() => g)),
});

const scoresOf = ({ inputs }: Case): number[][] =>
  inputs.groups === undefined ? [flat(inputs.scores!)] : (inputs.groups as Json[]).map(flat);

/** What keys of expected numbers, or names of cases, call the methods; an earlier one comes first. */
const methods: readonly (readonly [RegExp, GroupAdvantageName])[] = [
  [/dr_?grpo/, 'dr-grpo'],
  [/grpo/, 'grpo'],
  [/rloo/, 'rloo'],
  [/maxrl/, 'maxrl'],
  [/opo/, 'opo'],
  [/gpg/, 'gpg'],
];

function methodOf(name: string): GroupAdvantageName {
  const method = methods.find(([pattern]) => pattern.test(name));
  if (!method) throw new Error(`no group advantage is known by the name of ${name}`);
  return method[1];
}

/** `advantages` are those of the method that the case is named for. */
function checkGroups(test: Case): void {
  const groups = grouped(scoresOf(test));
  for (const [key, value] of Object.entries(test.expected)) {
    const method = methodOf(key === 'advantages' ? test.name : key);
    expectClose(groupAdvantages[method](groups), value, bound(test));
  }
}

/**
 * Against the mean and deviation of the other members. These do not depend on a member's own score: one higher than the
 * mean of the others, it has the advantage 1 / deviation.
 */
function checkOthers(test: Case): void {
  const rows = scoresOf(test);
  const others = (scores: number[], scale: GroupAdvantageSettings['scale']) =>
    groupAdvantages.grpo(grouped([scores]), { baseline: 'others', scale, epsilon: 0 });
  const baselines = rows.map((row) => {
    const advantages = others(row, 'none');
    return row.map((score, i) => score - advantages[i]!);
  });
  expectPrinted(test, 'baseline', baselines.flat());
  const deviations = rows.flatMap((row, g) =>
    row.map((_, i) => 1 / others(row.with(i, baselines[g]![i]! + 1), 'group')[i]!),
  );
  // A deviation of 0 divides by 1.
  const divisors = flat(test.expected.std!).map((deviation) => (deviation > 0 ? deviation : 1));
  expectClose(deviations, divisors, bound(test));
}

/** "eps 1e-6 on [6,3]": the group and its ε. */
const epsilons = ({ formula }: Case): (readonly [number[], number])[] =>
  Array.from(formula.matchAll(/eps (\d[\d.e-]*) on (\[[^\]]*\])/g), ([, epsilon, group]) => [
    JSON.parse(group!) as number[],
    Number(epsilon),
  ]);

function checkEpsilons(test: Case): void {
  for (const [key, value] of Object.entries(test.expected)) {
    const scores = numbers(test, key);
    const [, epsilon] = epsilons(test).find(([group]) => `${group}` === `${scores}`)!;
    expectClose(groupAdvantages.grpo(grouped([scores]), { epsilon }), value, bound(test));
  }
}

function checkRemax(test: Case): void {
  const { inputs } = test;
  const kl = numbers(test, 'kl');
  const [score, greedy, beta] = [inputs.score, inputs.greedy, inputs.beta].map(number) as [number, number, number];
  const gamma = inputs.gamma === undefined ? 1 : number(inputs.gamma);
  const whole = { lengths: [kl.length], mask: ones(kl.length) };
  const scores = kl.map((_, t) => (t === kl.length - 1 ? score : 0));
  const shaped = klPenalty(
    { ...whole, scores, logprobs: kl, reference: kl.map(() => 0) },
    { coefficient: beta, estimator: 'k1' },
  );
  const baselines = overTokens([greedy], whole.lengths, whole.mask);
  const accumulated = returnsToGo({ ...whole, rewards: shaped.rewards }, gamma).map(
    (value, t) => value - baselines[t]!,
  );
  expectPrinted(test, 'verl', accumulated);
  const original = remaxReturns({ ...whole, kl, scores: [score], baselines: [greedy] }, { beta, gamma });
  expectPrinted(test, 'original', original);
}

/** The losses are those of REINFORCE with A = −1: log π. */
function checkPromptMean(test: Case): void {
  const { lengths, mask } = rowsAndMask(test, 'losses');
  const logprobs = numbers(test, 'losses');
  const zeros = logprobs.map(() => 0);
  const weights = promptMeanWeights({ lengths, mask, groups: numbers(test, 'prompts') });
  const columns = { oldLogprobs: zeros, advantages: zeros.map(() => -1), weights };
  const loss = policyLosses.reinforce({ weighted: true, aggregation: { mode: 'token-sum' } });
  const result = evaluateLoss(loss, { lengths, mask, columns }, { logprobs, entropies: zeros });
  expectPrinted(test, 'value', result.loss);
}

function checkOverlong(test: Case): void {
  const { inputs } = test;
  const settings = {
    maxLength: number(inputs.max_length),
    cache: number(inputs.cache),
    factor: inputs.factor === undefined ? undefined : number(inputs.factor),
  };
  const lengths = numbers(test, 'lengths');
  expectPrinted(test, 'capped', overlongPenalties(lengths, settings));
  expectPrinted(test, 'uncapped', overlongPenalties(lengths, { ...settings, capped: false }));
}
