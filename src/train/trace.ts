/** A run's trace.json in Chrome's format, for Perfetto and about:tracing: spans on rows, in microseconds. */
import { type FileHandle, open, readFile } from 'node:fs/promises';
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

export class Trace {
  /** Milliseconds of the process clock that are microsecond `#base` of the trace. */
  #origin = performance.now();
  #base = 0;
  #events: (Span | RowName)[] = [];
  readonly #named = new Set<number>();
  #file: FileHandle | undefined;
  #empty = true;
  step = 0;

  /** What is drawn before is not in it. */
  get isOpen(): boolean {
    return this.#file !== undefined;
  }

  /** Appends to the trace of an earlier part of the run, after its last event. */
  async open(folder: string): Promise<void> {
    const path = join(folder, 'trace.json');
    const earlier = parseTrace(await readFile(path, 'utf8').catch(() => ''));
    this.#base = earlier.reduce((end, event) => Math.max(end, event.ts + event.dur), 0);
    this.#origin = performance.now();
    this.#file = await open(path, 'w');
    this.#events.unshift(...earlier);
    await this.#file.writeFile('[');
    await this.flush();
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
    if (!this.#file || this.#events.length === 0) return;
    const text = this.#events.map((event) => JSON.stringify(event)).join(',\n');
    this.#events = [];
    await this.#file.appendFile((this.#empty ? '\n' : ',\n') + text);
    this.#empty = false;
  }

  async close(): Promise<void> {
    await this.flush();
    await this.#file?.appendFile('\n]\n');
    await this.#file?.close();
    this.#file = undefined;
  }
}

/** Spans of a trace file, which may lack its end when the process was killed. */
function parseTrace(text: string): Span[] {
  return text
    .split('\n')
    .flatMap((line) => {
      try {
        return [JSON.parse(line.replace(/,$/, '')) as Span];
      } catch {
        return [];
      }
    })
    .filter((event) => event !== null && typeof event === 'object' && typeof event.ts === 'number');
}
