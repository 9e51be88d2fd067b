/** The built-in rewards by name. Each makes a reward function of its settings, and throws `REWARD_SETTINGS` for wrong ones. */
import type { RewardFunction } from '../reward-function.js';
import { boxed } from './boxed.js';
import { cosine } from './cosine.js';
import { exact } from './exact.js';
import { http } from './http.js';
import { jsonSchema } from './json-schema.js';
import { length } from './length.js';
import { numeric } from './numeric.js';
import { regex } from './regex.js';
import { repetition } from './repetition.js';

/** Settings to reward function, by name. */
export const rewardFunctions = { exact, numeric, boxed, regex, jsonSchema, length, cosine, repetition, http };

export type RewardFunctions = typeof rewardFunctions;

/** A built-in reward with its settings, as data. */
export type BuiltIn = {
  [Name in keyof RewardFunctions]: readonly [Name, Parameters<RewardFunctions[Name]>[0]];
}[keyof RewardFunctions];

export function builtInReward([name, settings]: BuiltIn): RewardFunction {
  // The settings of a pair are those of its name; the type of an indexed table does not keep them together.
  return (rewardFunctions[name] as (settings: unknown) => RewardFunction)(settings);
}
