/** The data of a run: rows to train on in their order, and rows to evaluate on. */
import type { Row } from '../data/rows.js';
import type { Config } from './config.js';
import { RowSource } from './row-source.js';
import type { Outcome, Task, Workshop } from './task.js';

export interface Sources<Item> {
  train: RowSource<Item>;
  evaluation: RowSource<Item> | undefined;
}

/** Opens both files; `convert` turns rows into what the algorithm learns from. The evaluation's order is the file's. */
export async function openSources<Item>(
  { data, seed }: Pick<Config, 'data' | 'seed'>,
  convert: (row: Row) => Item,
  { own }: Pick<Workshop, 'own'>,
): Promise<Sources<Item>> {
  const { shuffle, onError } = data;
  const train = own(await RowSource.open(data.train, convert, { shuffle, seed, onError }));
  if (data.eval === undefined) return { train, evaluation: undefined };
  return { train, evaluation: own(await RowSource.open(data.eval, convert, { shuffle: false, seed, onError })) };
}

/** A task's evaluation on the first `evaluation.rows` rows, when there is data for it. */
export function evaluation<Item>(
  { evaluation: source }: Sources<Item>,
  { evaluation: { rows } }: Pick<Config, 'evaluation'>,
  evaluate: (items: Item[]) => Promise<Outcome>,
): Pick<Task, 'evaluate'> {
  return source ? { evaluate: async () => evaluate(await source.take(0, Math.min(source.length, rows))) } : {};
}
