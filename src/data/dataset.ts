/**
 * A data file, JSONL or Parquet, with random access to its rows. Opening reads the file once and checks every row; what is kept
 * of a JSONL file is where its lines are.
 */
import { type FileHandle, open, stat } from 'node:fs/promises';
import { LockstepError } from '../errors.js';
import { type Columns, parseLine, scanLines } from './jsonl.js';
import { ParquetFile } from './parquet.js';
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
      if (!LockstepError.isInstance(row)) index.add(entry);
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

/** A row's whereabouts: its line, and its bytes in a JSONL file (0 in Parquet). */
interface Entry {
  line: number;
  start: number;
  end: number;
}

interface Source {
  scan(): AsyncIterable<Entry & { columns(): Columns }>;
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

async function parquetSource(path: string): Promise<Source> {
  const attemptRead = async <T>(work: Promise<T>): Promise<T> => {
    try {
      return await work;
    } catch (error) {
      throw unreadable(path, `it is not Parquet that can be read: ${(error as Error).message}`, error);
    }
  };
  const file = await attemptRead(ParquetFile.open(path));
  return {
    scan: async function* () {
      for (let i = 0; i < file.length; i++) {
        const columns = await attemptRead(file.row(i));
        yield { line: i + 1, start: 0, end: 0, columns: () => columns };
      }
    },
    read: ({ line }) => attemptRead(file.row(line - 1)),
    close: async () => {},
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
