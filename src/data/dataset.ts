/**
 * A data file, JSONL or Parquet, with random access to its rows. Opening reads the file once and checks every row; what is kept
 * of a JSONL file is where its lines are. The rows of a Parquet file are kept in a temporary file: a row of it can not be decoded
 * without its row group, which a shuffled order would do again for almost every row.
 */
import { type FileHandle, open, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { LockstepError } from '../errors.js';
import { type Columns, parseLine, scanLines } from './jsonl.js';
import { readParquet } from './parquet.js';
import { RowFile } from './row-file.js';
import { badRow, parseRow, type Row } from './rows.js';

/** Rows left out under `onError: 'skip'`. */
export interface SkippedRows {
  count: number;
  /** The first ten, each with file, line and reason. */
  errors: LockstepError[];
}

export interface DatasetOptions {
  /** What a bad row does: `stop` throws `DATA_BAD_ROW`; `skip` leaves it out and counts it. Default `stop`. */
  onError?: 'stop' | 'skip';
}

export interface Dataset extends AsyncDisposable {
  readonly path: string;
  /** Good rows. */
  readonly length: number;
  readonly skipped: SkippedRows;
  /** Row `index`, from 0. */
  row(index: number): Promise<Row>;
  /** Closes the file; idempotent. */
  close(): Promise<void>;
}

/**
 * Opens a data file.
 * Errors: `DATA_FILE_MISSING`, `DATA_UNREADABLE`, `DATA_BAD_ROW` (file, line, reason), `DATA_EMPTY`.
 */
export async function openDataset(path: string, { onError = 'stop' }: DatasetOptions = {}): Promise<Dataset> {
  const skipped: SkippedRows = { count: 0, errors: [] };
  const source = await openSource(path);
  const index = new RowIndex();
  try {
    for await (const entry of source.scan()) {
      const row = attempt(() => parseRow(entry.columns(), { file: path, line: entry.line }), path, entry.line);
      if (!LockstepError.isInstance(row)) index.add(await source.keep(entry));
      else skip(row, skipped, onError);
    }
    if (index.length === 0) throw emptyData(path, skipped);
  } catch (error) {
    await source.close();
    throw error;
  }
  return {
    path,
    length: index.length,
    skipped,
    row: async (i) => {
      const entry = index.at(i);
      if (!entry) throw new RangeError(`row ${i} of ${index.length} in ${path}`);
      return parseRow(await source.read(entry), { file: path, line: entry.line });
    },
    close: () => source.close(),
    [Symbol.asyncDispose]: () => source.close(),
  };
}

/**
 * Rows of a file in order, streamed: nothing is kept.
 * @param skipped counts what `onError: 'skip'` leaves out
 * Errors as `openDataset`, `DATA_EMPTY` after the last row.
 */
export async function* readRows(
  path: string,
  { onError = 'stop' }: DatasetOptions = {},
  skipped: SkippedRows = { count: 0, errors: [] },
): AsyncGenerator<Row> {
  const source = await openSource(path);
  let count = 0;
  try {
    for await (const entry of source.scan()) {
      const row = attempt(() => parseRow(entry.columns(), { file: path, line: entry.line }), path, entry.line);
      if (LockstepError.isInstance(row)) {
        skip(row, skipped, onError);
        continue;
      }
      count++;
      yield row;
    }
    if (count === 0) throw emptyData(path, skipped);
  } finally {
    await source.close();
  }
}

/** A row's whereabouts: its line, and the bytes to read it from. */
interface Entry {
  line: number;
  start: number;
  end: number;
}

/** A row as it passes by; its bytes are 0 in Parquet. */
interface Scanned extends Entry {
  columns(): Columns;
}

interface Source {
  scan(): AsyncIterable<Scanned>;
  /** The whereabouts of a scanned row, from which it can be read afterwards. */
  keep(scanned: Scanned): Entry | Promise<Entry>;
  read(entry: Entry): Promise<Columns>;
  close(): Promise<void>;
}

async function openSource(path: string): Promise<Source> {
  let handle: FileHandle;
  try {
    if ((await stat(path)).isDirectory()) throw unreadable(path, 'it is a directory; expected a JSONL or Parquet file');
    handle = await open(path, 'r');
  } catch (error) {
    if (LockstepError.isInstance(error)) throw error;
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw unreadable(path, (error as Error).message, error);
    throw new LockstepError('DATA_FILE_MISSING', `Data file ${path} does not exist; check the path.`, { path });
  }
  const magic = Buffer.alloc(4);
  await handle.read(magic, 0, 4, 0);
  if (magic.toString('latin1') !== 'PAR1') return linesSource(path, handle);
  await handle.close();
  return parquetSource(path);
}

function linesSource(path: string, handle: FileHandle): Source {
  return {
    scan: async function* () {
      for await (const { bytes, ...entry } of scanLines(path)) yield { ...entry, columns: () => parseLine(bytes) };
    },
    keep: ({ line, start, end }) => ({ line, start, end }),
    read: async ({ line, start, end }) => {
      const bytes = Buffer.allocUnsafe(end - start);
      const { bytesRead } = await handle.read(bytes, 0, bytes.length, start);
      try {
        return parseLine(bytes.subarray(0, bytesRead));
      } catch (error) {
        throw unreadable(
          path,
          `line ${line} has changed since the file was opened (${(error as Error).message})`,
          error,
        );
      }
    },
    close: () => handle.close(),
  };
}

function parquetSource(path: string): Source {
  let kept: RowFile | undefined;
  return {
    scan: async function* () {
      let line = 0;
      const rows = readParquet(path);
      try {
        for await (const columns of rows) yield { line: ++line, start: 0, end: 0, columns: () => columns };
      } catch (error) {
        throw unreadable(path, `it is not Parquet that can be read: ${(error as Error).message}`, error);
      }
    },
    keep: async ({ line, columns }) => {
      try {
        kept ??= await RowFile.create();
        return { line, ...kept.add(columns()) };
      } catch (error) {
        const reason = `its rows are kept in a file in ${tmpdir()} while they are used, and that fails (${(error as Error).message})`;
        throw unreadable(path, `${reason}; set TMPDIR to a folder with room for them, or give them as JSONL`, error);
      }
    },
    read: (entry) => kept!.read(entry),
    close: async () => kept?.close(),
  };
}

/** Lines and byte ranges of the good rows, 20 bytes a row. */
class RowIndex {
  length = 0;
  private lines = new Uint32Array(1024);
  private starts = new Float64Array(1024);
  private ends = new Float64Array(1024);

  add({ line, start, end }: Entry): void {
    if (this.length === this.lines.length) {
      this.lines = grown(this.lines, new Uint32Array(2 * this.length));
      this.starts = grown(this.starts, new Float64Array(2 * this.length));
      this.ends = grown(this.ends, new Float64Array(2 * this.length));
    }
    this.lines[this.length] = line;
    this.starts[this.length] = start;
    this.ends[this.length++] = end;
  }

  at(index: number): Entry | undefined {
    if (!(index >= 0 && index < this.length)) return undefined;
    return { line: this.lines[index]!, start: this.starts[index]!, end: this.ends[index]! };
  }
}

function grown<T extends Uint32Array | Float64Array>(from: T, to: T): T {
  to.set(from);
  return to;
}

/** A row, or the error that says why there is none. */
function attempt(parse: () => Row, file: string, line: number): Row | LockstepError {
  try {
    return parse();
  } catch (error) {
    return LockstepError.isInstance(error) ? error : badRow({ file, line }, (error as Error).message);
  }
}

function skip(error: LockstepError, skipped: SkippedRows, onError: 'stop' | 'skip'): void {
  if (onError === 'stop') throw error;
  skipped.count++;
  if (skipped.errors.length < 10) skipped.errors.push(error);
}

function emptyData(path: string, skipped: SkippedRows): LockstepError {
  const because =
    skipped.count > 0 ? `: all ${skipped.count} were bad and skipped (first: ${skipped.errors[0]!.message})` : '';
  return new LockstepError('DATA_EMPTY', `${path} has no rows${because}; expected at least one.`, {
    path,
    skipped: skipped.count,
  });
}

function unreadable(path: string, reason: string, cause?: unknown): LockstepError {
  return new LockstepError('DATA_UNREADABLE', `Cannot read ${path}: ${reason}.`, { path, reason }, { cause });
}
