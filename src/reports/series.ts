/** Metrics over steps, and the arithmetic that charts and summaries share. */
import type { MetricsRow } from '../train/events.js';

export interface Point {
  step: number;
  value: number;
}

export interface Series {
  /** Metric name. */
  key: string;
  label: string;
  /** Ascending by step; finite values only. */
  points: Point[];
  /** Measured now and then (an evaluation) and drawn as dots. */
  sparse?: boolean;
}

export interface SeriesSummary {
  count: number;
  /** Mean of the first and of the last tenth of the points: what a noisy curve begins and ends with. */
  start: number;
  end: number;
  first: number;
  last: number;
  minimum: number;
  maximum: number;
}

export function seriesOf(rows: readonly MetricsRow[], key: string, label = key): Series {
  const points = rows
    .filter((row) => typeof row[key] === 'number' && Number.isFinite(row[key]))
    .map((row) => ({ step: row.step, value: row[key]! }));
  return { key, label, points };
}

/** Every metric's name, in order of appearance. */
export function metricNames(rows: readonly MetricsRow[]): string[] {
  return [...new Set(rows.flatMap((row) => Object.keys(row)))].filter((name) => name !== 'step');
}

/** Undefined without points. */
export function summarise({ points }: Series): SeriesSummary | undefined {
  if (points.length === 0) return undefined;
  const tenth = Math.max(1, Math.floor(points.length / 10));
  let [minimum, maximum] = [Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY];
  for (const { value } of points) {
    if (value < minimum) minimum = value;
    if (value > maximum) maximum = value;
  }
  return {
    count: points.length,
    start: mean(points.slice(0, tenth)),
    end: mean(points.slice(-tenth)),
    first: points[0]!.value,
    last: points.at(-1)!.value,
    minimum,
    maximum,
  };
}

/** Sum of the values. */
export function total({ points }: Series): number {
  return points.reduce((sum, { value }) => sum + value, 0);
}

function mean(points: readonly Point[]): number {
  return points.reduce((sum, { value }) => sum + value, 0) / points.length;
}

/** Exponential moving average without start-up bias; `span` points carry most of the weight. */
export function smooth(points: readonly Point[], span: number): Point[] {
  const keep = 1 - 2 / (span + 1);
  let [sum, weight] = [0, 0];
  return points.map(({ step, value }) => {
    sum = keep * sum + value;
    weight = keep * weight + 1;
    return { step, value: sum / weight };
  });
}

/** At most about `limit` points: each bucket keeps its smallest and its largest, so that spikes stay visible. */
export function thin(points: readonly Point[], limit = 600): Point[] {
  if (points.length <= limit) return [...points];
  const bucket = Math.ceil(points.length / (limit / 2));
  const kept: Point[] = [];
  for (let begin = 0; begin < points.length; begin += bucket) {
    const group = points.slice(begin, begin + bucket);
    const low = group.reduce((a, b) => (b.value < a.value ? b : a));
    const high = group.reduce((a, b) => (b.value > a.value ? b : a));
    if (low === high) kept.push(low);
    else kept.push(...(low.step < high.step ? [low, high] : [high, low]));
  }
  return kept;
}
