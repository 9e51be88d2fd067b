/**
 * Numeric answer: 1 when the answer of the response is the number of the row's column, else 0, also for a response without one.
 * The answer is the first number behind the last `####` of a text that has one, as GSM8K writes solutions (Cobbe et al.
 * [2110.14168]), else its last number. The column is read in the same way.
 */
import type { RewardFunction } from '../reward-function.js';
import { numbersIn, type Readings, sameNumber } from './numbers.js';
import { badColumn, columnText, each } from './samples.js';

export interface NumericSettings {
  /** Of the row, with the right answer: a number, or text that ends in one. */
  readonly column: string;
  /** Relative to numbers above 1, absolute below. */
  readonly tolerance: number;
}

export function numeric({ column, tolerance }: NumericSettings): RewardFunction {
  return each((sample) => {
    const text = columnText(sample, column);
    const expected = answerOf(text);
    if (!expected) {
      const problem = `has no number in column ${JSON.stringify(column)}: ${JSON.stringify(text.slice(0, 60))}`;
      throw badColumn(column, problem, sample.row, text);
    }
    const given = answerOf(sample.response);
    return Number(given !== undefined && sameNumber(given, expected, tolerance));
  });
}

export function answerOf(text: string): Readings | undefined {
  const marker = text.lastIndexOf('####');
  const [line = ''] = marker < 0 ? [] : text.slice(marker + 4).split('\n');
  return numbersIn(line)[0] ?? numbersIn(text).at(-1);
}
