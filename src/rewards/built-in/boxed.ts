/**
 * Boxed answer: 1 when the last \boxed{..} of the response equals the row's column, as `math-text.ts` compares, else 0, also for a
 * response without one. The column holds an answer, or a solution whose last \boxed{..} is the answer, as in MATH [2103.03874].
 */
import type { RewardFunction } from '../reward-function.js';
import { sameMath } from './math-text.js';
import { columnText, each } from './samples.js';

export interface BoxedSettings {
  /** Of the row, with the right answer. */
  readonly column: string;
}

export function boxed({ column }: BoxedSettings): RewardFunction {
  return each((sample) => {
    const text = columnText(sample, column);
    const given = lastBoxed(sample.response);
    return Number(given !== undefined && sameMath(given, lastBoxed(text) ?? text));
  });
}

/** What stands in the last \boxed{..} that is closed. */
export function lastBoxed(text: string): string | undefined {
  let end = text.length;
  for (;;) {
    const begin = text.lastIndexOf('\\boxed', end);
    if (begin < 0) return undefined;
    const open = /^\\boxed\s*\{/.exec(text.slice(begin, begin + 40))?.[0].length;
    const content = open === undefined ? undefined : balanced(text, begin + open);
    if (content !== undefined) return content;
    if (begin === 0) return undefined;
    end = begin - 1;
  }
}

/** From `begin`, behind an opening brace, to the brace that closes it; escaped braces (sets) are text. */
function balanced(text: string, begin: number): string | undefined {
  let depth = 1;
  for (let i = begin; i < text.length; i++) {
    if (text[i] === '\\') i++;
    else if (text[i] === '{') depth++;
    else if (text[i] === '}' && --depth === 0) return text.slice(begin, i);
  }
  return undefined;
}
