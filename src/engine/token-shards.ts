/** Batches cut by rows for data-parallel replicas, and what they give for them joined again. */
import { evenRanges, type TokenBatch } from '../data/batch.js';
import type { ForwardOutput, ForwardResult, TokenGradients } from './engine.js';

/** As many batches as asked for, of rows that follow each other, as equally many as can be; some may be empty. */
export function cutRows({ tokens, lengths }: TokenBatch, count: number): TokenBatch[] {
  let token = 0;
  return evenRanges(lengths.length, count).map(({ begin: row, end }) => {
    const rows = lengths.subarray(row, end);
    const begin = token;
    token += rows.reduce((sum, length) => sum + length, 0);
    return { tokens: tokens.subarray(begin, token), lengths: rows };
  });
}

/** The gradients of each batch's tokens. */
export function cutGradients(gradients: TokenGradients, shards: readonly TokenBatch[]): TokenGradients[] {
  let begin = 0;
  return shards.map(({ tokens }) => {
    const end = begin + tokens.length;
    const own = Object.fromEntries(
      (Object.entries(gradients) as [string, Float32Array][]).map(([name, all]) => [name, all.subarray(begin, end)]),
    );
    begin = end;
    return own;
  });
}

/** Outputs of batches that follow each other as those of one. */
export function joinResults(results: readonly ForwardResult[]): ForwardResult {
  const [first] = results;
  if (results.length === 1) return first!;
  const names = Object.keys(first ?? {}) as ForwardOutput[];
  return Object.fromEntries(
    names.map((name) => {
      const arrays = results.map((result) => result[name]!);
      const joined = new Float32Array(arrays.reduce((sum, { length }) => sum + length, 0));
      let at = 0;
      for (const array of arrays) {
        joined.set(array, at);
        at += array.length;
      }
      return [name, joined];
    }),
  );
}
