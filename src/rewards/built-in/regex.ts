/** Regular expression of JavaScript: 1 for a response in which it matches somewhere (anchor it with ^ and $), else 0. */
import { LockstepError } from '../../errors.js';
import type { RewardFunction } from '../reward-function.js';
import { each } from './samples.js';

export interface RegexSettings {
  readonly pattern: string;
  /** Of i, m, s, u, v; g and y have no meaning here. */
  readonly flags: string;
}

/** Throws `REWARD_SETTINGS`. */
export function regex({ pattern, flags }: RegexSettings): RewardFunction {
  const expression = compileRegex(pattern, flags);
  return each(({ response }) => Number(expression.test(response)));
}

export function compileRegex(pattern: string, flags: string): RegExp {
  try {
    if (/[^imsuv]/.test(flags)) throw new Error(`flags ${JSON.stringify(flags)} are not of i, m, s, u, v`);
    return new RegExp(pattern, flags);
  } catch (cause) {
    const { message } = cause as Error;
    const facts = { pattern, flags };
    throw new LockstepError('REWARD_SETTINGS', `${message}; correct the pattern or its flags`, facts, { cause });
  }
}
