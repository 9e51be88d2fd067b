/** Exact answer: 1 for a response that is the text of the row's column, 0 for any other. White space around both is not compared. */
import type { RewardFunction } from '../reward-function.js';
import { columnText, each } from './samples.js';

export interface ExactSettings {
  /** Of the row, with the right answer. */
  readonly column: string;
  readonly ignoreCase: boolean;
}

export function exact({ column, ignoreCase }: ExactSettings): RewardFunction {
  const form = (text: string) => (ignoreCase ? text.trim().toLowerCase() : text.trim());
  return each((sample) => Number(form(sample.response) === form(columnText(sample, column))));
}
