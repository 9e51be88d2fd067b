/**
 * Cosine length reward: what a correct and a wrong answer are paid by their length, along half a cosine from the value at no tokens to
 * the value at `max` tokens and beyond. Yeo et al. 2025 [2502.03373], section 4.1: correct answers are paid less the longer they are,
 * wrong ones more.
 */
import type { RewardFunction } from '../reward-function.js';
import { boxed } from './boxed.js';
import { exact } from './exact.js';
import { numeric } from './numeric.js';

/** Values at 0 tokens and at the most tokens. */
export type Ends = readonly [number, number];

/** Which built-in reward says whether an answer is correct, with its settings. */
export type AnswerCheck =
  | { readonly exact: Parameters<typeof exact>[0] }
  | { readonly numeric: Parameters<typeof numeric>[0] }
  | { readonly boxed: Parameters<typeof boxed>[0] };

export interface CosineSettings {
  readonly max: number;
  readonly correct: Ends;
  readonly wrong: Ends;
  readonly answer: AnswerCheck;
}

/** first + (last − first)/2 · (1 − cos(π min(tokens, max) / max)). */
export const cosineLength = (tokens: number, max: number, [first, last]: Ends): number =>
  first + ((last - first) / 2) * (1 - Math.cos((Math.PI * Math.min(tokens, max)) / max));

export function cosine({ max, correct, wrong, answer }: CosineSettings): RewardFunction {
  const check = checkOf(answer);
  return async (samples, context) => {
    const right = await check(samples, context);
    return samples.map(({ tokens }, i) => cosineLength(tokens.length, max, Number(right[i]) > 0 ? correct : wrong));
  };
}

function checkOf(answer: AnswerCheck): RewardFunction {
  if ('exact' in answer) return exact(answer.exact);
  return 'numeric' in answer ? numeric(answer.numeric) : boxed(answer.boxed);
}
