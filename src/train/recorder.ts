/**
 * Where the time goes: phases of a step, summed for its metrics row (`seconds.<phase>`) and kept as a Chrome trace
 * (trace.json, for about:tracing and Perfetto). Algorithms and workers are wrapped from outside and know nothing of it.
 *
 * Each rank has a row of its own: its works, and between them `idle`. What a work spent in communicators is drawn at its
 * begin, first the waits for other ranks (`idle`), then the rest (`communication`): the sums are exact, the places are not.
 */
import { type FileHandle, open, readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Work } from '../engine/device.js';

interface TraceEvent {
  name: string;
  cat: string;
  ph: 'X';
  pid: 1;
  tid: number;
  /** Microseconds. */ ts: number;
  dur: number;
  args?: { step: number };
}

interface Drawn extends Pick<TraceEvent, 'name' | 'cat' | 'tid'> {
  start: number;
  end: number;
  step: number;
}

/** The name of a row. */
interface RowName {
  name: 'thread_name';
  ph: 'M';
  pid: 1;
  tid: number;
  args: { name: string };
}

/** Works that move tensors instead of computing. */
const transfers: ReadonlySet<Work['operation']> = new Set([
  'load',
  'save',
  'snapshot',
  'transition',
  'read',
  'write',
] as const);
/** Rows of the trace; ranks come behind them. What goes on behind the steps is in no sum. */
const rows = { phase: 1, native: 2, transfer: 3, background: 4 } as const;
type Category = keyof typeof rows;
const firstRankRow = 5;
/** Milliseconds of process.hrtime(), which works carry, when performance.now() is 0: one clock, two origins. */
const clockOffset = Number(process.hrtime.bigint()) / 1e6 - performance.now();
/** Shorter parts of a work are not drawn. */
const drawnSeconds = 1e-6;

export class Recorder {
  /** Milliseconds of the process clock that are microsecond `#base` of the trace. */
  #origin = performance.now();
  #base = 0;
  /** By metric. */
  #sums = new Map<string, number>();
  #events: (TraceEvent | RowName)[] = [];
  /** Seconds at which each rank's last work ended. */
  #idleSince = new Map<number, number>();
  #file: FileHandle | undefined;
  #empty = true;
  step = 0;

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

  /** Runs `work` as a phase; native calls, transfers and what goes on behind the steps are drawn on rows of their own. */
  async phase<T>(name: string, work: () => Promise<T> | T, category: Category = 'phase'): Promise<T> {
    const start = performance.now();
    const step = this.step;
    try {
      return await work();
    } finally {
      const end = performance.now();
      const seconds = (end - start) / 1000;
      if (category !== 'background') this.add(`seconds.${category === 'phase' ? name : category}`, seconds);
      this.#draw({ name, cat: category, tid: rows[category], start, end, step });
    }
  }

  /** Adds to a metric of the present row: `seconds.<phase>` or `bytes.<transfer>`. */
  add(metric: string, amount: number): void {
    this.#sums.set(metric, (this.#sums.get(metric) ?? 0) + amount);
  }

  /** `start` and `end` in milliseconds of performance.now(). The trace begins when its file is open. */
  #draw({ start, end, step, ...event }: Drawn): void {
    if (!this.#file) return;
    const at = (milliseconds: number): number => Math.round((milliseconds - this.#origin) * 1000);
    const ts = this.#base + at(start);
    this.#events.push({ ...event, ph: 'X', pid: 1, ts, dur: at(end) - at(start), args: { step } });
  }

  /** A work of a rank, each rank's in their order. */
  work({ operation, microBatch, begin, end, communicating, waiting }: Work, rank: number): void {
    if (!this.#file) return;
    const tid = firstRankRow + rank;
    if (!this.#idleSince.has(rank)) {
      this.#events.push({ name: 'thread_name', ph: 'M', pid: 1, tid, args: { name: `rank ${rank}` } });
    }
    const draw = (name: string, cat: string, from: number, to: number): void => {
      if (to - from < drawnSeconds) return;
      const [start, end] = [from, to].map((seconds) => seconds * 1000 - clockOffset) as [number, number];
      this.#draw({ name, cat, tid, start, end, step: this.step });
    };
    draw('idle', 'idle', this.#idleSince.get(rank) ?? begin, begin);
    this.#idleSince.set(rank, end);
    const name = microBatch === undefined ? operation : `${operation} ${microBatch}`;
    draw(name, transfers.has(operation) ? 'transfer' : 'compute', begin, end);
    draw('waiting', 'idle', begin, begin + waiting);
    draw('communication', 'communication', begin + waiting, begin + communicating);
  }

  /** What was added since the last call. */
  take(): Record<string, number> {
    const entries = [...this.#sums].map(([metric, sum]) => [metric, Number(sum.toFixed(6))]);
    this.#sums.clear();
    return Object.fromEntries(entries);
  }

  /** Leaves the seconds since the last call to the trace; bytes count in the next row. */
  forgetSeconds(): void {
    for (const metric of this.#sums.keys()) if (metric.startsWith('seconds.')) this.#sums.delete(metric);
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

  /** An object whose listed methods are phases, also when it calls them itself; a phase is named by its table entry. */
  wrap<T extends object>(target: T, phases: Partial<Record<keyof T, string>>, category?: Category): T {
    const recorder = this;
    return new Proxy(target, {
      get(object, key, proxy) {
        const value = Reflect.get(object, key, object) as unknown;
        if (typeof value !== 'function') return value;
        const name = phases[key as keyof T];
        if (name === undefined) return value.bind(proxy);
        return (...args: unknown[]) =>
          recorder.phase(name, () => value.apply(object, args) as Promise<unknown>, category);
      },
    });
  }
}

/** Events of a trace file, which may lack its end when the process was killed. */
function parseTrace(text: string): TraceEvent[] {
  return text
    .split('\n')
    .flatMap((line) => {
      try {
        return [JSON.parse(line.replace(/,$/, '')) as TraceEvent];
      } catch {
        return [];
      }
    })
    .filter((event) => event !== null && typeof event === 'object' && typeof event.ts === 'number');
}
