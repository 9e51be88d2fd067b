/** What the terms of a reward or a cost say about each other. */
import type { RewardTerm } from './reward-schema.js';
import type { Rule } from './rules.js';

/** Endings of `reward.<name>` and `cost.<name>` that are metrics of all runs. */
const takenNames = {
  reward: ['mean', 'greedy', 'accuracy', 'margin', 'chosen', 'rejected'],
  cost: ['mean', 'multiplier', 'value'],
};

interface Terms {
  algorithm: string;
  terms: readonly RewardTerm[];
}

/** Of the terms under `key`. */
export const rewardRules = (key: 'reward' | 'cost'): readonly Rule<Terms>[] => [
  ({ algorithm, terms }) =>
    terms.length === 0
      ? { path: key, problem: `${algorithm} needs a ${key}; set ${key}.model, ${key}.function, or a list of terms` }
      : undefined,
  ({ terms }) => {
    const [, second] = terms.flatMap((term, i) => ('model' in term ? [i] : []));
    if (second === undefined) return undefined;
    return { path: `${key}.${second}.model`, problem: `a run has at most one ${key} model; leave one of them out` };
  },
  ({ terms }) => {
    const i = terms.findIndex(({ name }, index) => terms.findIndex((other) => other.name === name) < index);
    if (i < 0) return undefined;
    const problem = `two terms have the name ${terms[i]!.name}, by which metrics tell them apart; name one otherwise`;
    return { path: `${key}.${i}.name`, problem };
  },
  ({ terms }) => {
    const i = terms.findIndex(({ name }) => takenNames[key].includes(name));
    if (i < 0) return undefined;
    return {
      path: `${key}.${i}.name`,
      problem: `${key}.${terms[i]!.name} is a metric of the whole ${key}; choose another`,
    };
  },
  ({ terms }) =>
    terms.length > 0 && terms.every(({ weight }) => weight === 0)
      ? { path: key, problem: 'all weights are 0, so nothing would be learned; give a term another weight' }
      : undefined,
];
