/**
 * Where the time goes: phases of a step, summed for its metrics row (`seconds.<phase>`) and kept as a Chrome trace
 * (trace.json, for about:tracing and Perfetto). Algorithms and workers are wrapped from outside and know nothing of it.
 */
import { type FileHandle, open, readFile } from 'node:fs/promises';
import { join } from 'node:path';

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

const rows = { phase: 1, native: 2, background: 3 } as const;
type Category = keyof typeof rows;

export class Recorder {
  /** Milliseconds of the process clock that are microsecond `#base` of the trace. */
  #origin = performance.now();
  #base = 0;
  #seconds = new Map<string, number>();
  #events: TraceEvent[] = [];
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

  /** Runs `work` as a phase. Native calls and what goes on behind the steps are drawn on rows of their own; the latter is in no sum. */
  async phase<T>(name: string, work: () => Promise<T> | T, category: Category = 'phase'): Promise<T> {
    const start = performance.now();
    const step = this.step;
    try {
      return await work();
    } finally {
      const end = performance.now();
      const key = category === 'native' ? 'native' : name;
      if (category !== 'background') this.#seconds.set(key, (this.#seconds.get(key) ?? 0) + (end - start) / 1000);
      this.#events.push({
        name,
        cat: category,
        ph: 'X',
        pid: 1,
        tid: rows[category],
        ts: this.#base + Math.round((start - this.#origin) * 1000),
        dur: Math.round((end - start) * 1000),
        args: { step },
      });
    }
  }

  /** `seconds.<phase>` since the last call. */
  take(): Record<string, number> {
    const entries = [...this.#seconds].map(([name, seconds]) => [`seconds.${name}`, Number(seconds.toFixed(6))]);
    this.#seconds.clear();
    return Object.fromEntries(entries);
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
  wrap<T extends object>(target: T, phases: Partial<Record<keyof T, string>>, category?: 'phase' | 'native'): T {
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
