/** What the terms of a reward say about each other; of every algorithm that learns from rewards. */
import type { RewardTerm } from './reward-schema.js';
import type { Rule } from './rules.js';

/** Endings of `reward.<name>` that are metrics of all runs. */
const takenNames = ['mean'];

export const rewardRules: readonly Rule<{ algorithm: string; reward: readonly RewardTerm[] }>[] = [
  ({ algorithm, reward }) =>
    reward.length === 0
      ? {
          path: 'reward',
          problem: `${algorithm} needs a reward; set reward.model, reward.function, or a list of terms`,
        }
      : undefined,
  ({ reward }) => {
    const [, second] = reward.flatMap((term, i) => ('model' in term ? [i] : []));
    if (second === undefined) return undefined;
    return { path: `reward.${second}.model`, problem: 'a run has at most one reward model; leave one of them out' };
  },
  ({ reward }) => {
    const i = reward.findIndex(({ name }, index) => reward.findIndex((other) => other.name === name) < index);
    if (i < 0) return undefined;
    const problem = `two terms have the name ${reward[i]!.name}, by which metrics tell them apart; name one otherwise`;
    return { path: `reward.${i}.name`, problem };
  },
  ({ reward }) => {
    const i = reward.findIndex(({ name }) => takenNames.includes(name));
    if (i < 0) return undefined;
    return {
      path: `reward.${i}.name`,
      problem: `reward.${reward[i]!.name} is the metric of the whole reward; choose another`,
    };
  },
  ({ reward }) =>
    reward.length > 0 && reward.every(({ weight }) => weight === 0)
      ? { path: 'reward', problem: 'all weights are 0, so nothing would be learned; give a term another weight' }
      : undefined,
];
