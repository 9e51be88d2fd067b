/** Rows of a data file as what an algorithm learns from, in the order of positions. */
import { stat } from 'node:fs/promises';
import { evenLength } from '../data/batch.js';
import { type Dataset, openDataset } from '../data/dataset.js';
import { badRow, type Row } from '../data/rows.js';
import { type DataOrder, dataOrder } from '../data/sampler.js';
import { LockstepError } from '../errors.js';
import { explainPositionLimit } from '../layout/config.js';
import type { ModelShape } from '../layout/model-shape.js';
import type { Config } from './config.js';

export interface RowSourceOptions {
  onError: 'stop' | 'skip';
  shuffle: boolean;
  seed: number;
}

/** Rows left out under `onError: skip`, each counted once, with the reason of one of them. */
export interface Skipped {
  count: number;
  example: string | undefined;
}

/** By which a resume tells that a data file is another than it was. */
export interface DataSize {
  /** Good ones. */
  rows: number;
  bytes: number;
}

export class RowSource<Item> {
  readonly #dataset: Dataset;
  readonly #order: DataOrder;
  readonly #convert: (row: Row) => Item;
  readonly #onError: 'stop' | 'skip';
  readonly skipped: Skipped;
  readonly size: DataSize;
  /** Those that could be read and not converted, by index. */
  readonly #unusable = new Set<number>();

  private constructor(
    dataset: Dataset,
    bytes: number,
    convert: (row: Row) => Item,
    { onError, shuffle, seed }: RowSourceOptions,
  ) {
    this.size = { rows: dataset.length, bytes };
    this.#dataset = dataset;
    this.#order = dataOrder({ length: dataset.length, seed, shuffle });
    this.#convert = convert;
    this.#onError = onError;
    this.skipped = { count: dataset.skipped.count, example: dataset.skipped.errors[0]?.message };
  }

  /** `convert` throws a LockstepError for a row that cannot be used. */
  static async open<Item>(
    path: string,
    convert: (row: Row) => Item,
    options: RowSourceOptions,
  ): Promise<RowSource<Item>> {
    const dataset = await openDataset(path, { onError: options.onError });
    return new RowSource(dataset, (await stat(path)).size, convert, options);
  }

  get length(): number {
    return this.#dataset.length;
  }

  /** The rows at positions [position, position + count) of the endless order; rows that are skipped are missing. */
  async usable(position: number, count: number): Promise<Item[]> {
    const items: Item[] = [];
    for (let i = position; i < position + count; i++) {
      const index = this.#order.indexAt(i);
      const item = this.#use(await this.#dataset.row(index), index);
      if (item !== undefined) items.push(item);
    }
    return items;
  }

  /** Those of a whole batch. @throws LockstepError DATA_EMPTY when none is left. */
  async take(position: number, count: number): Promise<Item[]> {
    const items = await this.usable(position, count);
    if (items.length > 0) return items;
    throw new LockstepError(
      'DATA_EMPTY',
      `${this.#dataset.path}: all ${count} rows of a batch were bad and skipped (for example: ${this.skipped.example}); mend the data`,
      { path: this.#dataset.path },
    );
  }

  async close(): Promise<void> {
    await this.#dataset.close();
  }

  /** What a resumed run needs, so that it counts as the run never stopped. */
  state(): { skippedRows?: number[] } {
    return this.#unusable.size > 0 ? { skippedRows: [...this.#unusable] } : {};
  }

  restore({ skippedRows = [] }: Readonly<Record<string, unknown>>): void {
    for (const index of skippedRows as readonly number[]) this.#count(index);
  }

  #count(index: number): void {
    if (this.#unusable.has(index)) return;
    this.#unusable.add(index);
    this.skipped.count++;
  }

  #use(row: Row, index: number): Item | undefined {
    try {
      return this.#convert(row);
    } catch (error) {
      if (this.#onError === 'stop' || !LockstepError.isInstance(error)) throw error;
      this.#count(index);
      this.skipped.example ??= error.message;
      return undefined;
    }
  }
}

/**
 * @throws LockstepError DATA_BAD_ROW when a sequence of the row has more tokens than the model has positions, or all of them, which
 * are in one micro-batch, more than it takes.
 */
export function checkRowLength(
  row: Row,
  sequences: readonly Int32Array[],
  shape: ModelShape,
  { microTokens }: Config['batch'],
): void {
  const longest = Math.max(...sequences.map(({ length }) => length));
  if (longest > shape.maxPositions) {
    throw badRow(row.place, `the row has ${longest} tokens, but ${explainPositionLimit(shape)}; shorten or split it`);
  }
  const tokens = sequences.reduce((sum, { length }) => sum + evenLength(length), 0);
  if (tokens <= microTokens) return;
  throw badRow(
    row.place,
    `the row takes ${tokens} tokens of a micro-batch (lengths are padded to even), more than batch.microTokens (${microTokens}); ` +
      'raise it, or shorten or split the row',
  );
}
