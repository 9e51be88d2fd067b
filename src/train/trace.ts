/** A run's trace.json in Chrome's format, for Perfetto and about:tracing: spans on rows, in microseconds. */
import { type FileHandle, open, truncate } from 'node:fs/promises';
import { join } from 'node:path';

interface Span {
  name: string;
  cat: string;
  ph: 'X';
  pid: 1;
  tid: number;
  /** Microseconds. */ ts: number;
  dur: number;
  args?: Record<string, unknown>;
}

/** The name of a row. */
interface RowName {
  name: 'thread_name';
  ph: 'M';
  pid: 1;
  tid: number;
  args: { name: string };
}

/** `start` and `end` in milliseconds of performance.now(). */
export interface Drawn extends Pick<Span, 'name' | 'cat' | 'tid'> {
  start: number;
  end: number;
  args?: Record<string, unknown>;
}

/** What opens a trace reads it whole, as one text: Node.js makes none of twice this length. */
const mostBytes = 256 * 2 ** 20;
/** The last events of a trace are in so much of its end. */
const tailBytes = 2 ** 20;
const opening = '[';
const ending = '\n]\n';

/** A diagnostic: when it cannot be written, or holds `limitBytes`, it ends, and the run goes on. */
export class Trace {
  /** Milliseconds of the process clock that are microsecond `#base` of the trace. */
  #origin = performance.now();
  #base = 0;
  #events: (Span | RowName)[] = [];
  readonly #named = new Set<number>();
  #file: FileHandle | undefined;
  /** Of the file. */
  #bytes = 0;
  #ended: string | undefined;
  step = 0;

  constructor(private readonly limitBytes = mostBytes) {}

  /** What is drawn before is not in it. */
  get isOpen(): boolean {
    return this.#file !== undefined;
  }

  /** Goes on behind the last event of an earlier part of the run. */
  async open(folder: string): Promise<void> {
    const path = join(folder, 'trace.json');
    await this.#orEnd(async () => {
      const { bytes, microseconds } = await lastEvent(path);
      await truncate(path, bytes);
      this.#file = await open(path, 'a');
      this.#bytes = bytes;
      this.#base = microseconds;
      this.#origin = performance.now();
      if (bytes === 0) await this.#append(opening);
    });
  }

  /** Names a row, once. */
  nameRow(tid: number, name: string): void {
    if (!this.isOpen || this.#named.has(tid)) return;
    this.#named.add(tid);
    this.#events.push({ name: 'thread_name', ph: 'M', pid: 1, tid, args: { name } });
  }

  draw({ start, end, args, ...event }: Drawn): void {
    if (!this.isOpen) return;
    const at = (milliseconds: number): number => Math.round((milliseconds - this.#origin) * 1000);
    const [ts, dur] = [this.#base + at(start), at(end) - at(start)];
    this.#events.push({ ...event, ph: 'X', pid: 1, ts, dur, args: { step: this.step, ...args } });
  }

  async flush(): Promise<void> {
    if (!this.isOpen || this.#events.length === 0) return;
    const events = this.#events.map((event) => JSON.stringify(event)).join(',\n');
    this.#events = [];
    const text = (this.#bytes === opening.length ? '\n' : ',\n') + events;
    await this.#orEnd(async () => {
      if (this.#bytes + Buffer.byteLength(text) > this.limitBytes)
        throw new Error(`it may hold ${this.limitBytes} bytes and has ${this.#bytes}; move it away to begin another`);
      await this.#append(text);
    });
  }

  async close(): Promise<void> {
    await this.flush();
    await this.#orEnd(() => this.#end());
  }

  /** Why it ended before the run did, said once. */
  takeEnded(): string | undefined {
    const ended = this.#ended;
    this.#ended = undefined;
    return ended;
  }

  async #append(text: string): Promise<void> {
    await this.#file!.appendFile(text);
    this.#bytes += Buffer.byteLength(text);
  }

  async #end(): Promise<void> {
    const file = this.#file;
    this.#file = undefined;
    this.#events = [];
    if (!file) return;
    try {
      // A write that failed may have left a part of its text.
      await file.truncate(this.#bytes);
      await file.appendFile(ending);
    } finally {
      await file.close();
    }
  }

  async #orEnd(work: () => Promise<void>): Promise<void> {
    try {
      await work();
    } catch (error) {
      this.#ended ??= (error as Error).message;
      await this.#end().catch(() => undefined);
    }
  }
}

/** Where the last event of a trace ends in its file, and in time; a killed process leaves a part of an event behind it. */
async function lastEvent(path: string): Promise<{ bytes: number; microseconds: number }> {
  const { begin, tail } = await readTail(path);
  let [bytes, microseconds, at] = [0, 0, begin];
  for (const line of tail.toString('latin1').split('\n')) {
    const text = line.replace(/,$/, '');
    const event = parseEvent(text);
    if (event) bytes = at + text.length;
    if (event?.ph === 'X') microseconds = Math.max(microseconds, event.ts + event.dur);
    at += line.length + 1;
  }
  if (bytes === 0 && begin > 0)
    throw new Error(`its last ${tailBytes} bytes hold no event; move it away to begin another`);
  return { bytes, microseconds };
}

async function readTail(path: string): Promise<{ begin: number; tail: Buffer }> {
  const file = await open(path, 'a+');
  try {
    const { size } = await file.stat();
    const begin = Math.max(0, size - tailBytes);
    const { buffer: tail } = await file.read({ buffer: Buffer.alloc(size - begin), position: begin });
    return { begin, tail };
  } finally {
    await file.close();
  }
}

function parseEvent(line: string): Span | RowName | undefined {
  try {
    const event = JSON.parse(line) as Partial<Span> | null;
    return event !== null && typeof event === 'object' && 'ph' in event ? (event as Span) : undefined;
  } catch {
    return undefined;
  }
}
