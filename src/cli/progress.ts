/** A training run as lines of text: what happened, how fast it goes, when it ends. */
import { formatNumber, formatSeconds } from '../reports/numbers.js';
import type { MemoryTable, MetricsRow, TrainEvent } from '../train/events.js';
import type { Terminal } from './terminal.js';

/** Metrics of the live line: the first few that the run has. */
const shownMetrics: Record<string, string> = {
  'reward.mean': 'reward',
  'cost.mean': 'cost',
  'reward.accuracy': 'accuracy',
  'reward.margin': 'margin',
  loss: 'loss',
  'kl.mean': 'kl',
  'response.length': 'length',
  'value.loss': 'value loss',
  'gradient.norm': 'gradient',
};
/** Plain lines come at most this often. */
const plainSeconds = 2;
/** Steps whose pace predicts the end. */
const paceSteps = 20;

export class TrainProgress {
  readonly #terminal: Terminal;
  readonly #verbose: boolean;
  readonly #now: () => number;
  /** Clock readings in seconds: the start, then one a step, the newest `paceSteps`. */
  #marks: number[] = [];
  #lastPlain = Number.NEGATIVE_INFINITY;

  /** `now` is a clock in seconds. */
  constructor(terminal: Terminal, { verbose = false, now = () => performance.now() / 1000 } = {}) {
    this.#terminal = terminal;
    this.#verbose = verbose;
    this.#now = now;
  }

  show(event: TrainEvent): void {
    if (event.type === 'start') this.#start(event);
    else if (event.type === 'step') this.#step(event);
    else for (const line of eventLines(event, this.#terminal, this.#verbose)) this.#terminal.note(line);
  }

  #start({ config, step, steps, output, memory, resumedFrom }: Extract<TrainEvent, { type: 'start' }>): void {
    const terminal = this.#terminal;
    this.#marks = [this.#now()];
    terminal.note(
      `${terminal.style('bold', config.algorithm)} of ${config.model}: ${steps} steps, ${config.dtype}, ${config.threads} threads, into ${output}`,
    );
    for (const line of memoryLines(memory, this.#verbose)) terminal.note(line);
    if (resumedFrom !== undefined) terminal.note(`continues after step ${step} (${resumedFrom})`);
  }

  #step({ step, steps, metrics }: Extract<TrainEvent, { type: 'step' }>): void {
    const now = this.#now();
    this.#marks = [...this.#marks, now].slice(-paceSteps - 1);
    const pace = (now - this.#marks[0]!) / Math.max(1, this.#marks.length - 1);
    const speed = pace < 1 ? `${formatNumber(1 / Math.max(pace, 1e-9), 3)} steps/s` : `${formatNumber(pace, 3)} s/step`;
    const eta = step === steps ? '' : `  ETA ${formatSeconds(pace * (steps - step))}`;
    const text = `step ${String(step).padStart(String(steps).length)}/${steps}  ${metricsText(named(metrics), 4)}  ${speed}${eta}`;
    if (this.#terminal.live && !this.#verbose) {
      this.#terminal.status(`${bar(step / steps)} ${text}`);
      return;
    }
    if (!this.#verbose && now - this.#lastPlain < plainSeconds && step !== steps) return;
    this.#lastPlain = now;
    this.#terminal.note(text);
  }
}

type Occasion = Exclude<TrainEvent, { type: 'start' | 'step' }>;

/** Lines of what happens now and then. */
function eventLines(event: Occasion, terminal: Terminal, verbose: boolean): string[] {
  switch (event.type) {
    case 'evaluation':
      return [`evaluation at step ${event.step}: ${metricsText(evaluationMetrics(event.metrics), 8)}`];
    case 'checkpoint':
      return verbose ? [`saved ${event.directory} in ${formatSeconds(event.seconds)}`] : [];
    case 'warning':
      return [`${terminal.style('yellow', 'warning')} ${event.code}: ${event.message}`];
    case 'sample':
      return [];
    case 'interrupted':
      return [interruptedText(event)];
    case 'done':
      return [doneText(event)];
  }
}

function bar(share: number, width = 16): string {
  const eighths = Math.round(share * width * 8);
  const full = Math.floor(eighths / 8);
  const part = ' ▏▎▍▌▋▊▉'[eighths % 8]!;
  return `▕${('█'.repeat(full) + (full < width ? part : '')).padEnd(width)}▏`;
}

function named(metrics: MetricsRow): [string, number][] {
  return Object.entries(shownMetrics)
    .filter(([key]) => metrics[key] !== undefined && !(key === 'loss' && 'reward.mean' in metrics))
    .map(([key, label]) => [label, metrics[key]!]);
}

function evaluationMetrics(metrics: MetricsRow): [string, number][] {
  return Object.entries(metrics).filter(([key]) => key.startsWith('eval.'));
}

function metricsText(metrics: readonly [string, number][], limit: number): string {
  return metrics
    .slice(0, limit)
    .map(([label, value]) => `${label} ${formatNumber(value)}`)
    .join('  ');
}

function memoryLines({ lines, totalBytes, budgetBytes, gpus = [] }: MemoryTable, verbose: boolean): string[] {
  const where = (pool: string | undefined) => (pool === undefined ? '' : `${pool}: `);
  const total = [
    ...gpus.map(
      ({ pool, first, last, shared }) =>
        `${where(pool)}on GPU ${first}${last > first ? `..${last}` : ''}${shared ? ', shared with the other pools' : ''}`,
    ),
    `memory: ${formatBytes(totalBytes)} of ${formatBytes(budgetBytes)}`,
  ];
  if (!verbose) return total;
  return [
    ...total,
    ...lines.map(({ pool, what, bytes }) => `  ${formatBytes(bytes).padStart(10)}  ${where(pool)}${what}`),
  ];
}

export function formatBytes(bytes: number): string {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  const power = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(1, bytes)) / 10));
  return `${formatNumber(bytes / 1024 ** power, 4)} ${units[power]}`;
}

function interruptedText({ step, checkpoint, output }: Extract<TrainEvent, { type: 'interrupted' }>): string {
  const saved = checkpoint === undefined ? 'nothing was saved' : `the newest checkpoint is ${checkpoint}`;
  return `interrupted after step ${step}; ${saved}; go on with --resume (${output})`;
}

function doneText({ step, checkpoint, output, seconds }: Extract<TrainEvent, { type: 'done' }>): string {
  return `done: ${step} steps in ${formatSeconds(seconds)}\nmodel:  ${checkpoint}\nreport: lockstep report ${output}`;
}
