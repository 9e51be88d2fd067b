import type { TokenBatch } from '../src/data/batch.js';

/** The sequences of a batch, in order, as views of its tokens. */
export function unpackBatch(batch: TokenBatch): Int32Array[] {
  let at = 0;
  return Array.from(batch.lengths, (length) => {
    at += length;
    return batch.tokens.subarray(at - length, at);
  });
}
