/** Parquet through hyparquet, row group by row group. */
import * as zlib from 'node:zlib';
import { asyncBufferFromFile, parquetMetadataAsync, parquetReadObjects } from 'hyparquet';
import type { Columns } from './jsonl.js';

/** Snappy is hyparquet's own; Node has these (zstd from version 22.15). */
const compressors = {
  GZIP: (input: Uint8Array) => new Uint8Array(zlib.gunzipSync(input)),
  BROTLI: (input: Uint8Array) => new Uint8Array(zlib.brotliDecompressSync(input)),
  ...('zstdDecompressSync' in zlib && {
    ZSTD: (input: Uint8Array) =>
      new Uint8Array((zlib as unknown as { zstdDecompressSync(data: Uint8Array): Buffer }).zstdDecompressSync(input)),
  }),
};

/**
 * Rows in order, with 64-bit integers as numbers wherever they are exact. One row group is decoded at a time.
 * Throws the reader's error when the file is not Parquet.
 */
export async function* readParquet(path: string): AsyncGenerator<Columns> {
  const file = await asyncBufferFromFile(path);
  const metadata = await parquetMetadataAsync(file);
  let rowStart = 0;
  for (const { num_rows } of metadata.row_groups) {
    const rowEnd = rowStart + Number(num_rows);
    const rows = await parquetReadObjects({ file, metadata, rowStart, rowEnd, compressors });
    for (const row of rows) yield plain(row) as Columns;
    rowStart = rowEnd;
  }
}

/** Parquet's integers are BigInt; a row of JSON has numbers. */
function plain(value: unknown): unknown {
  if (typeof value === 'bigint') return Number.isSafeInteger(Number(value)) ? Number(value) : value;
  if (Array.isArray(value)) return value.map(plain);
  if (value instanceof BigInt64Array || value instanceof BigUint64Array) return Array.from(value, plain);
  if (typeof value === 'object' && value !== null && Object.getPrototypeOf(value) === Object.prototype) {
    return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, plain(inner)]));
  }
  return value;
}
