/** Parquet through hyparquet: metadata at once, row groups when a row of theirs is asked for. */
import * as zlib from 'node:zlib';
import {
  type AsyncBuffer,
  asyncBufferFromFile,
  type FileMetaData,
  parquetMetadataAsync,
  parquetReadObjects,
} from 'hyparquet';
import type { Columns } from './jsonl.js';

/** Uncompressed bytes of row groups kept decoded. */
const cacheBytes = 256 * 2 ** 20;

/** Snappy is hyparquet's own; Node has these (zstd from version 22.15). */
const compressors = {
  GZIP: (input: Uint8Array) => new Uint8Array(zlib.gunzipSync(input)),
  BROTLI: (input: Uint8Array) => new Uint8Array(zlib.brotliDecompressSync(input)),
  ...('zstdDecompressSync' in zlib && {
    ZSTD: (input: Uint8Array) =>
      new Uint8Array((zlib as unknown as { zstdDecompressSync(data: Uint8Array): Buffer }).zstdDecompressSync(input)),
  }),
};

interface RowGroup {
  begin: number;
  end: number;
  bytes: number;
}

export class ParquetFile {
  readonly length: number;
  private readonly groups: readonly RowGroup[];
  private readonly decoded = new Map<RowGroup, Promise<Columns[]>>();

  private constructor(
    private readonly file: AsyncBuffer,
    private readonly metadata: FileMetaData,
  ) {
    let end = 0;
    this.groups = metadata.row_groups.map((group) => {
      const begin = end;
      end += Number(group.num_rows);
      return { begin, end, bytes: Number(group.total_byte_size) };
    });
    this.length = end;
  }

  /** Throws the reader's error when the file is not Parquet. */
  static async open(path: string): Promise<ParquetFile> {
    const file = await asyncBufferFromFile(path);
    return new ParquetFile(file, await parquetMetadataAsync(file));
  }

  /** Row `index`, from 0, with 64-bit integers as numbers wherever they are exact. */
  async row(index: number): Promise<Columns> {
    const group = this.groups.find((candidate) => index >= candidate.begin && index < candidate.end);
    if (!group) throw new Error(`row ${index} is beyond the ${this.length} rows of the file`);
    const rows = await this.read(group);
    return rows[index - group.begin]!;
  }

  private read(group: RowGroup): Promise<Columns[]> {
    const known = this.decoded.get(group);
    if (known) {
      this.decoded.delete(group);
      this.decoded.set(group, known);
      return known;
    }
    this.makeRoom(group.bytes);
    const rows = parquetReadObjects({
      file: this.file,
      metadata: this.metadata,
      rowStart: group.begin,
      rowEnd: group.end,
      compressors,
    }).then((objects) => objects.map((row) => plain(row) as Columns));
    this.decoded.set(group, rows);
    rows.catch(() => this.decoded.delete(group));
    return rows;
  }

  /** Forgets the groups used longest ago until `bytes` more fit. */
  private makeRoom(bytes: number): void {
    let held = bytes;
    for (const group of this.decoded.keys()) held += group.bytes;
    for (const group of [...this.decoded.keys()]) {
      if (held <= cacheBytes) return;
      this.decoded.delete(group);
      held -= group.bytes;
    }
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
