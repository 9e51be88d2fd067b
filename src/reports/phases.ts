/** Where the time of a run goes: seconds by phase. */
import type { MetricsRow } from '../train/events.js';
import { metricNames, type Series, seriesOf, total } from './series.js';

/** `seconds.*` that run over other phases and would be counted twice in a stack. */
const overlapping = new Set(['step', 'native', 'transfer', 'transition', 'total']);

/**
 * Seconds by phase, the longest phase first. What phases leave of `seconds.step` is a phase of its own; a run whose models
 * are called without phases shows the time in native calls instead.
 */
export function phaseSeries(rows: readonly MetricsRow[]): Series[] {
  const phases = metricNames(rows)
    .filter((name) => name.startsWith('seconds.') && !overlapping.has(name.slice('seconds.'.length)))
    .map((name) => seriesOf(rows, name, name.slice('seconds.'.length)));
  const inner = phases.filter(({ label }) => label !== 'evaluation' && label !== 'checkpoint');
  const step = seriesOf(rows, 'seconds.step', 'step');
  const native = seriesOf(rows, 'seconds.native', 'model');
  const inPhases = inner.reduce((seconds, series) => seconds + total(series), 0);
  if (inPhases < 0.2 * total(step) && total(native) <= total(step)) inner.push(native);
  const covered = new Map<number, number>();
  for (const { points } of inner)
    for (const { step: at, value } of points) covered.set(at, (covered.get(at) ?? 0) + value);
  const left = step.points.map(({ step: at, value }) => ({
    step: at,
    value: Math.max(0, value - (covered.get(at) ?? 0)),
  }));
  const rest: Series = { key: 'seconds.rest', label: inner.length > 0 ? 'rest' : 'step', points: left };
  return [...new Set([...phases, ...inner, rest])]
    .filter((series) => total(series) > 0)
    .sort((a, b) => total(b) - total(a));
}

/** The first `count` - 1 series, and the sum of the others as one. */
export function foldTail(series: readonly Series[], count: number): Series[] {
  if (series.length <= count) return [...series];
  const sums = new Map<number, number>();
  for (const { points } of series.slice(count - 1)) {
    for (const { step, value } of points) sums.set(step, (sums.get(step) ?? 0) + value);
  }
  const points = [...sums].map(([step, value]) => ({ step, value })).sort((a, b) => a.step - b.step);
  return [...series.slice(0, count - 1), { key: 'seconds.others', label: 'others', points }];
}
