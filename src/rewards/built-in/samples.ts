/** What built-in rewards have in common: a judge of one sample, and the answer that its row holds. */
import { LockstepError } from '../../errors.js';
import type { Reward, RewardFunction, RewardSample } from '../reward-function.js';

/** A reward function that looks at one sample at a time. */
export function each(judge: (sample: RewardSample) => Reward): RewardFunction {
  return (samples) => samples.map(judge);
}

/** The text of a column; numbers as JavaScript writes them. Throws `REWARD_COLUMN` for a row that holds no text or number there. */
export function columnText({ row }: RewardSample, column: string): string {
  const value = Object.hasOwn(row, column) ? row[column] : undefined;
  if (typeof value === 'string') return value;
  if (typeof value === 'bigint' || (typeof value === 'number' && Number.isFinite(value))) return String(value);
  throw badColumn(column, value === undefined ? `has no column ${JSON.stringify(column)}` : undefined, row, value);
}

/** Says that a column of a row is not what a reward needs; `problem` by default that it holds neither text nor number. */
export function badColumn(
  column: string,
  problem: string | undefined,
  row: RewardSample['row'],
  received: unknown,
): LockstepError {
  const kind = received === null ? 'null' : Array.isArray(received) ? 'a list' : `a value of type ${typeof received}`;
  const what = problem ?? `holds ${kind} in column ${JSON.stringify(column)}, where text or a number was expected`;
  const columns = Object.keys(row);
  return new LockstepError(
    'REWARD_COLUMN',
    `the data row ${what}; its columns are ${columns.join(', ') || 'none'}. Name the column of the right answer, or repair the row`,
    { column, columns, received },
  );
}
