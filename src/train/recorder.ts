/**
 * Where the time goes: phases of a step, summed for its metrics row (`seconds.<phase>`) and drawn in the trace. Algorithms and
 * workers are wrapped from outside and know nothing of it.
 *
 * A run of several pools has rows for each. Each rank has a row of its own: its works, and between them `idle`. What a work spent in
 * communicators is drawn at its begin, first the waits for other ranks (`idle`), then the rest (`communication`): the sums are
 * exact, the places are not. The row `materialised` lists the answers whose data came to the controller.
 *
 * A GPU has rows for its streams: the computation of each rank's calls, with the seconds that the stream was busy in them, and the
 * copies each way between its memory and the host's, with their bytes.
 */
import type { Materialised } from '../cluster/future.js';
import type { Work } from '../engine/device.js';
import type { StreamWork } from '../engine/native.js';
import type { RunWarning } from './loop.js';
import { Trace } from './trace.js';

/** Works that move tensors instead of computing. */
const transfers: ReadonlySet<Work['operation']> = new Set([
  'load',
  'save',
  'snapshot',
  'transition',
  'read',
  'write',
] as const);
/** Rows of a lane; ranks come behind them. What goes on behind the steps is in no sum. */
const rows = { phase: 1, native: 2, transfer: 3, background: 4 } as const;
type Category = keyof typeof rows;
const firstRankRow = 5;
const materialisedRow = 99;
const rowsOfLane = 100;
/** Rows of a GPU, behind all lanes: copies, which all pools share, then the computation of each lane. */
const firstGpuRow = 100_000;
const rowsOfGpu = 100;
const copyRows = ['to host', 'from host'];
/** What the rows of a pool's lane are called. */
const rowNames: Record<Category, string> = {
  ...{ phase: 'calls', native: 'native calls', transfer: 'transfers', background: 'background' },
};
/** Milliseconds of process.hrtime(), which works carry, when performance.now() is 0: one clock, two origins. */
const clockOffset = Number(process.hrtime.bigint()) / 1e6 - performance.now();
/** Of performance.now(), from seconds of works. */
const milliseconds = (seconds: number): number => seconds * 1000 - clockOffset;
/** Shorter parts of a work are not drawn. */
const drawnSeconds = 1e-6;

/** Rows of the trace for what does not overlap: the run's own, or one of several pools'. */
export class Lane {
  /** Seconds at which each rank's last work ended. */
  readonly #idleSince = new Map<number, number>();

  /** `index` is 0 for the run, 1, 2, .. for its pools; the names of a pool's rows begin with its own. */
  constructor(
    protected readonly trace: Trace,
    /** By metric. */
    protected readonly sums: Map<string, number>,
    private readonly index = 0,
    private readonly pool?: string,
  ) {}

  /** Runs `work` as a phase; native calls, transfers and what goes on behind the steps are drawn on rows of their own. */
  async phase<T>(name: string, work: () => Promise<T> | T, category: Category = 'phase'): Promise<T> {
    const start = performance.now();
    const { step } = this.trace;
    try {
      return await work();
    } finally {
      const end = performance.now();
      const seconds = (end - start) / 1000;
      if (category !== 'background') this.add(`seconds.${category === 'phase' ? name : category}`, seconds);
      const tid = this.row(rows[category], rowNames[category]);
      this.trace.draw({ name, cat: category, tid, start, end, args: { step } });
    }
  }

  /** Adds to a metric of the present row: `seconds.<phase>` or `bytes.<transfer>`. */
  add(metric: string, amount: number): void {
    this.sums.set(metric, (this.sums.get(metric) ?? 0) + amount);
  }

  /** A work of a rank, each rank's in their order. */
  work(work: Work, rank: number): void {
    if (!this.trace.isOpen) return;
    const { operation, microBatch, begin, end, communicating, waiting, streams = [] } = work;
    const name = microBatch === undefined ? operation : `${operation} ${microBatch}`;
    for (const stream of streams) this.#stream(name, stream);
    if (operation === 'move') return;
    const tid = this.index * rowsOfLane + firstRankRow + rank;
    this.trace.nameRow(tid, this.pool === undefined ? `rank ${rank}` : `${this.pool}/rank ${rank}`);
    const draw = (name: string, cat: string, from: number, to: number): void => {
      if (to - from < drawnSeconds) return;
      this.trace.draw({ name, cat, tid, start: milliseconds(from), end: milliseconds(to) });
    };
    draw('idle', 'idle', this.#idleSince.get(rank) ?? begin, begin);
    this.#idleSince.set(rank, end);
    draw(name, transfers.has(operation) ? 'transfer' : 'compute', begin, end);
    draw('waiting', 'idle', begin, begin + waiting);
    draw('communication', 'communication', begin + waiting, begin + communicating);
  }

  #stream(name: string, { gpu, stream, begin, end, busy, bytes }: StreamWork): void {
    const copies = copyRows.indexOf(stream);
    const row = copies < 0 ? copyRows.length + this.index : copies;
    const tid = firstGpuRow + gpu * rowsOfGpu + row;
    const owner = copies < 0 && this.pool !== undefined ? `${this.pool}/` : '';
    this.trace.nameRow(tid, `${owner}GPU ${gpu} ${stream}`);
    const args = copies < 0 ? { busy } : { bytes };
    this.trace.draw({ name, cat: 'stream', tid, start: milliseconds(begin), end: milliseconds(end), args });
  }

  /** An object whose listed methods are phases, also when it calls them itself; a phase is named by its table entry. */
  wrap<T extends object>(target: T, phases: Partial<Record<keyof T, string>>, category?: Category): T {
    const lane = this;
    return new Proxy(target, {
      get(object, key, proxy) {
        const value = Reflect.get(object, key, object) as unknown;
        if (typeof value !== 'function') return value;
        const name = phases[key as keyof T];
        if (name === undefined) return value.bind(proxy);
        return (...args: unknown[]) => lane.phase(name, () => value.apply(object, args) as Promise<unknown>, category);
      },
    });
  }

  private row(row: number, name: string): number {
    const tid = this.index * rowsOfLane + row;
    if (this.pool !== undefined) this.trace.nameRow(tid, `${this.pool}/${name}`);
    return tid;
  }
}

export class Recorder extends Lane {
  constructor() {
    super(new Trace(), new Map());
  }

  /** The rows of one of several pools, numbered from 0. */
  lane(pool: string, index: number): Lane {
    return new Lane(this.trace, this.sums, index + 1, pool);
  }

  get step(): number {
    return this.trace.step;
  }

  set step(step: number) {
    this.trace.step = step;
  }

  open(folder: string): Promise<void> {
    return this.trace.open(folder);
  }

  /** An answer that came to the controller; one without arrays is not worth a line. */
  materialised({ label, bytes }: Materialised): void {
    if (bytes === 0) return;
    this.add('bytes.materialised', bytes);
    this.trace.nameRow(materialisedRow, 'materialised');
    const now = performance.now();
    this.trace.draw({ name: label, cat: 'materialise', tid: materialisedRow, start: now, end: now, args: { bytes } });
  }

  /** What was added since the last call. */
  take(): Record<string, number> {
    const entries = [...this.sums].map(([metric, sum]) => [metric, Number(sum.toFixed(6))]);
    this.sums.clear();
    return Object.fromEntries(entries);
  }

  /** Leaves the seconds since the last call to the trace; bytes count in the next row. */
  forgetSeconds(): void {
    for (const metric of this.sums.keys()) if (metric.startsWith('seconds.')) this.sums.delete(metric);
  }

  flush(): Promise<void> {
    return this.trace.flush();
  }

  /** A warning, once, when the trace has ended before the run. */
  traceWarning(): RunWarning | undefined {
    const ended = this.trace.takeEnded();
    if (ended === undefined) return undefined;
    const message = `nothing more is drawn in trace.json: ${ended}; the run goes on without`;
    return { code: 'TRACE_ENDED', message };
  }

  close(): Promise<void> {
    return this.trace.close();
  }
}
