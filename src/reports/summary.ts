/** A run in numbers: what `report --json` prints, and what the terminal and the page show first. */
import { headlineMetrics } from './catalogue.js';
import { type Hint, healthHints } from './health.js';
import { phaseSeries } from './phases.js';
import type { RunRecord } from './run-record.js';
import { metricNames, type SeriesSummary, seriesOf, summarise, total } from './series.js';

export interface RunSummary {
  run: string;
  algorithm: string;
  model: string;
  /** Steps done, and planned. */
  step: number;
  steps: number;
  complete: boolean;
  /** Sum of all phases of all steps. */
  seconds: number;
  /** Mean seconds a step, by phase; what happens now and then is spread over all steps. */
  phases: Record<string, number>;
  metrics: Record<string, SeriesSummary>;
  headline: string[];
  hints: Hint[];
  checkpoints: number[];
}

export function summariseRun(run: RunRecord): RunSummary {
  const step = run.rows.at(-1)?.step ?? 0;
  const steps = typeof run.config.steps === 'number' ? run.config.steps : step;
  const metrics: Record<string, SeriesSummary> = {};
  for (const name of metricNames(run.rows)) {
    const summary = summarise(seriesOf(run.rows, name));
    if (summary) metrics[name] = summary;
  }
  const phases = phaseSeries(run.rows);
  const stepRows = run.rows.filter((row) => row.step > 0).length;
  const algorithm = typeof run.config.algorithm === 'string' ? run.config.algorithm : 'unknown';
  return {
    run: run.folder,
    algorithm,
    model: typeof run.config.model === 'string' ? run.config.model : 'unknown',
    step,
    steps,
    complete: step >= steps && step > 0,
    seconds: phases.reduce((sum, each) => sum + total(each), 0),
    phases: Object.fromEntries(phases.map((each) => [each.label, total(each) / Math.max(1, stepRows)])),
    metrics,
    headline: headlineMetrics(metrics),
    hints: healthHints(run),
    checkpoints: run.checkpoints,
  };
}

/** `complete, 100 steps` or `stopped after 37 of 100 steps`; a run may also still be going. */
export function describeState({ complete, step, steps }: RunSummary): string {
  if (complete) return `complete, ${step} steps`;
  return step === 0 ? `no step of ${steps} done yet` : `${step} of ${steps} steps done`;
}
