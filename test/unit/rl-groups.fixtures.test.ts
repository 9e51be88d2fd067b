/**
 * Every golden case of critic-free advantages and of DAPO's rules; per-token inputs also with NaN where they are
 * masked.
 */

import { expect } from 'vitest';
import { fillGroups, teaches } from '../../src/algorithms/sampling.js';
import { overlongPenalties } from '../../src/data/overlong.js';
import {
  type GroupAdvantageName,
  type GroupAdvantageSettings,
  type Groups,
  groupAdvantages,
  overTokens,
  returnsToGo,
} from '../../src/losses/group-advantages.js';
import { whiten } from '../../src/losses/statistics.js';
import { optimalTokenBaseline, remaxReturns } from '../../src/losses/token-baselines.js';
import {
  Batch,
  type Case,
  describeTopics,
  expectClose,
  flat,
  type Json,
  number,
  type Topic,
  type Variant,
} from '../rl-fixtures.js';
import { inputsOf, twice } from './rl-policy-cases.js';

describeTopics({ group_advantages: twice(checkAdvantages), dapo: checkDapo });

type Inputs = Record<string, Json>;

function checkAdvantages(test: Case, inputs: Inputs, poisoned: boolean): void {
  if (inputs.rewards_per_function) checkGdpo(test, inputs);
  else if (inputs.kl_per_token) checkRemaxOriginal(test, inputs);
  else if (inputs.group_size) checkBatchScaled(test, inputs);
  else if (inputs.reward_baselines || inputs.sum_pi_squared || inputs.gamma !== undefined)
    checkReturns(test, inputs, poisoned);
  else checkGroups(test, inputs);
}

/** Names of cases that say what the advantages are; a longer one comes before its beginning. */
const named: readonly (readonly [string, GroupAdvantageName])[] = [
  ['grpo_passk', 'pass@k'],
  ['grpo', 'grpo'],
  ['dr_grpo', 'dr-grpo'],
  ['rloo', 'rloo'],
  ['reinforce_plus_plus_baseline', 'reinforce++-baseline'],
  ['opo', 'opo'],
  ['gpg', 'gpg'],
  ['maxrl', 'maxrl'],
];

/** The score of a sequence is the sum of all its token rewards, masked ones too, and empty sequences are counted. */
function groupsOf(name: GroupAdvantageName, inputs: Inputs): Groups {
  const sum = (row: Json) => flat(row).reduce((total, x) => total + x, 0);
  const lengths = (inputs.response_mask as Json[]).map(sum);
  return {
    scores: (inputs.token_level_rewards as Json[]).map(sum),
    groups: flat(inputs.index!),
    ...(name === 'opo' ? { lengths } : {}),
  };
}

function checkGroups(test: Case, inputs: Inputs): void {
  const found = named.find(([beginning]) => test.name.startsWith(beginning));
  if (!found) throw new Error(`no group advantage is known by the name of case ${test.name}`);
  const [, name] = found;
  const groups = groupsOf(name, inputs);
  const settings: GroupAdvantageSettings = {
    singletons: 'keep',
    epsilon: inputs.epsilon === undefined ? undefined : number(inputs.epsilon),
    normalizer: inputs.f_norm === undefined ? undefined : number(inputs.f_norm),
    scale: inputs.norm_by_std === false ? 'none' : 'group',
  };
  const { lengths, mask } = new Batch(inputs, false);
  const spread = overTokens(groupAdvantages[name](groups, settings), lengths, mask);
  expectClose(name === 'reinforce++-baseline' ? whiten(spread, mask) : spread, test.expected.advantages!);
  checkVariants(test, name, groups);
}

const variantSettings: Readonly<Record<string, GroupAdvantageSettings>> = {
  trl: { singletons: 'zero' },
  zero_for_one: { singletons: 'zero' },
  openrlhf: { singletons: 'keep' },
  dr_grpo_code: { singletons: 'keep' },
  nemo_rl: { singletons: 'zero', baseline: 'others' },
};

function checkVariants({ variants = {} }: Case, name: GroupAdvantageName, groups: Groups): void {
  for (const [variant, settings] of Object.entries(variantSettings)) {
    const expected = variants[variant];
    if (!expected) continue;
    const advantages = groupAdvantages[name](groups, { ...settings, epsilon: epsilonOf(expected) });
    // OpenRLHF's NaN for a group of one is no rule to offer.
    const wanted = flat(expected.sequence_advantages!);
    expectClose(
      advantages.filter((_, b) => !Number.isNaN(wanted[b])),
      wanted.filter((x) => !Number.isNaN(x)),
    );
  }
}

function epsilonOf({ who }: Variant): number | undefined {
  const found = /eps (\d[\d.e-]*)/.exec(who);
  return found ? Number(found[1]) : undefined;
}

function checkReturns({ expected }: Case, inputs: Inputs, poisoned: boolean): void {
  const batch = new Batch(inputs, poisoned);
  const { lengths, mask } = batch;
  const gamma = inputs.gamma === undefined ? 1 : number(inputs.gamma);
  const returns = returnsToGo({ lengths, mask, rewards: batch.tokens('token_level_rewards') }, gamma);
  expectClose(returns, expected.returns!);
  if (inputs.gamma !== undefined) expectClose(whiten(returns, mask), expected.advantages!);
  if (inputs.reward_baselines) {
    const baselines = overTokens(flat(inputs.reward_baselines), lengths, mask);
    expectClose(
      returns.map((value, t) => value - baselines[t]!),
      expected.advantages!,
    );
  }
  if (inputs.sum_pi_squared) {
    const advantages = optimalTokenBaseline({
      lengths,
      mask,
      groups: flat(inputs.index!),
      returns,
      logprobs: batch.tokens('old_log_probs'),
      sumOfSquares: batch.tokens('sum_pi_squared'),
    });
    expectClose(advantages, expected.advantages!);
  }
}

function checkRemaxOriginal({ expected, variants }: Case, inputs: Inputs): void {
  const rows = inputs.kl_per_token as Json[][];
  const batch = {
    lengths: rows.map((row) => row.length),
    mask: rows.flat().map(() => 1),
    kl: flat(rows),
    scores: flat(inputs.scores!),
    baselines: flat(inputs.greedy_scores!),
  };
  const settings = { beta: number(inputs.beta), gamma: number(inputs.gamma), clip: number(inputs.clip) };
  expectClose(remaxReturns(batch, settings), expected.returns!);
  const variant = variants?.last_token_undiscounted;
  if (variant) expectClose(remaxReturns(batch, { ...settings, lastExponent: 0 }), variant.returns!);
}

function checkGdpo({ expected, variants }: Case, inputs: Inputs): void {
  const rewards = (inputs.rewards_per_function as Json[]).map(flat);
  const groups = { scores: rewards[0]!, groups: flat(inputs.index!), rewards };
  const { lengths, mask } = new Batch(inputs, false);
  const settings = { weights: flat(inputs.weights!), singletons: 'keep' } as const;
  expectClose(whiten(overTokens(groupAdvantages.gdpo(groups, settings), lengths, mask), mask), expected.advantages!);
  const trl = variants?.trl;
  if (!trl) return;
  const epsilon = epsilonOf(trl);
  const scores = groupAdvantages.gdpo(groups, { weights: settings.weights, epsilon });
  const whole = { scores, groups: flat(inputs.index!).map(() => 0) };
  expectClose(groupAdvantages.grpo(whole, { epsilon }), trl.sequence_advantages!);
}

function checkBatchScaled({ expected }: Case, inputs: Inputs): void {
  const scores = flat(inputs.scores!);
  const groups = scores.map((_, b) => Math.floor(b / number(inputs.group_size)));
  expectClose(
    groupAdvantages.grpo({ scores, groups }, { scale: 'batch', epsilon: 1e-4 }),
    expected.sequence_advantages!,
  );
}

async function checkDapo(test: Case, topic: Topic): Promise<void> {
  const inputs = inputsOf(topic, test);
  if (inputs.rounds) await checkFilling(test, inputs);
  else if (inputs.groups) checkFilter(test, inputs);
  else checkOverlong(test, inputs);
}

function checkOverlong({ expected, variants }: Case, inputs: Inputs): void {
  const settings = {
    maxLength: number(inputs.max_length),
    cache: number(inputs.cache),
    factor: number(inputs.factor),
  };
  const lengths = flat(inputs.lengths!);
  expectClose(overlongPenalties(lengths, settings), expected.penalties!);
  const uncapped = variants?.uncapped;
  if (uncapped) expectClose(overlongPenalties(lengths, { ...settings, capped: false }), uncapped.penalties!);
}

const judged = (groups: Json) =>
  Object.entries(groups as Record<string, number[]>).map(([name, scores]) => ({
    name,
    teaches: teaches(scores, scores.length),
  }));
const namesOf = (groups: readonly { name: string }[]): string[] => groups.map(({ name }) => name);

function checkFilter({ expected }: Case, inputs: Inputs): void {
  expectNames(namesOf(judged(inputs.groups!).filter((group) => group.teaches)), expected.kept!);
}

async function checkFilling({ expected }: Case, inputs: Inputs): Promise<void> {
  const target = number(inputs.target);
  const rounds = (inputs.rounds as Json[]).map(judged);
  const filled = await fillGroups(target, rounds.length, async (_, round) => rounds[round]!);
  expectNames(namesOf(filled.groups), expected.batch!);
  expectNames(
    { rounds_used: filled.rounds, full: filled.groups.length === target, dropped_groups: filled.dropped },
    { rounds_used: expected.rounds_used!, full: expected.full!, dropped_groups: expected.dropped_groups! },
  );
}

const expectNames = (actual: Json, expected: Json): void => expect(actual).toEqual(expected);
