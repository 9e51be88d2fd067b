/** Which metrics make which chart, and what to say about them. Metrics that a run lacks leave no empty chart. */
import type { MetricsRow } from '../train/events.js';
import { metricNames, type Series, seriesOf, total } from './series.js';

export interface ChartSpec {
  title: string;
  /** What a reader should look for. */
  note: string;
  kind: 'lines' | 'stack';
  series: Series[];
  /** Both ends of the value axis include zero. */
  fromZero?: boolean;
  /** Not noisy: drawn as it is, without a moving average. */
  exact?: boolean;
  unit?: string;
}

interface ChartDefinition {
  title: string;
  note: string;
  /** Metric and its label; `eval.` twins are added as dots. */
  metrics: Record<string, string>;
  fromZero?: boolean;
  /** Not noisy: drawn as it is, without a moving average. */
  exact?: boolean;
  unit?: string;
}

const definitions: readonly ChartDefinition[] = [
  {
    title: 'Reward',
    note: 'What the policy is paid per response. It should rise, then level off.',
    metrics: { 'reward.mean': 'reward', 'reward.model': 'reward model', 'cost.mean': 'cost' },
  },
  {
    title: 'Loss',
    note: 'Of the weights before each update.',
    metrics: { loss: 'loss' },
  },
  {
    title: 'Accuracy',
    note: 'Share of pairs in which the chosen answer scores above the rejected one.',
    metrics: { 'reward.accuracy': 'accuracy' },
  },
  {
    title: 'Score margin',
    note: 'Score of the chosen answer minus the rejected one.',
    metrics: { 'reward.margin': 'margin' },
  },
  {
    title: 'KL to the reference',
    note: 'How far the policy has moved from where it started. A run-away curve means that it exploits the reward.',
    metrics: { 'kl.mean': 'KL' },
  },
  {
    title: 'Value loss',
    note: 'Error of the critic.',
    metrics: { 'value.loss': 'value loss' },
    fromZero: true,
  },
  {
    title: 'Explained variance of values',
    note: '1: the critic predicts returns perfectly; 0: no better than their mean.',
    metrics: { 'value.explained': 'explained' },
  },
  {
    title: 'Response length',
    note: 'Tokens per response. Growth without better answers is reward hacking.',
    metrics: { 'response.length': 'length' },
    fromZero: true,
    unit: 'tokens',
  },
  {
    title: 'Truncated responses',
    note: 'Share that reached the length limit.',
    metrics: { 'response.truncated': 'truncated' },
    fromZero: true,
  },
  {
    title: 'KL of one update',
    note: 'Between the policy that sampled and the updated one.',
    metrics: { 'policy.kl': 'KL' },
  },
  { title: 'Policy loss', note: 'The clipped surrogate.', metrics: { 'policy.loss': 'policy loss' } },
  {
    title: 'Clip fraction',
    note: 'Share of tokens whose ratio left the clip range. Above 0.3, lower the learning rate.',
    metrics: { 'policy.clipFraction': 'clipped' },
    fromZero: true,
  },
  {
    title: 'Entropy',
    note: 'Of the policy, per token. A collapse to 0 ends exploration.',
    metrics: { entropy: 'entropy' },
    fromZero: true,
  },
  {
    title: 'Gradient norm',
    note: 'Before clipping.',
    metrics: { 'gradient.norm': 'trained model', 'value.gradientNorm': 'critic' },
    fromZero: true,
  },
  {
    title: 'Learning rate',
    note: 'As scheduled.',
    metrics: { learningRate: 'learning rate' },
    fromZero: true,
    exact: true,
  },
  {
    title: 'Tokens per step',
    note: 'Trained tokens, prompts included.',
    metrics: { tokens: 'tokens' },
    fromZero: true,
    unit: 'tokens',
  },
  {
    title: 'State moved per step',
    note: 'Models that take turns on the device: what left it, came back, and was dropped without being copied; weights that came to the generation layout.',
    metrics: {
      'bytes.offload': 'offloaded',
      'bytes.restore': 'restored',
      'bytes.dropped': 'dropped',
      'bytes.transition': 'gathered for generation',
    },
    fromZero: true,
    exact: true,
    unit: 'bytes',
  },
];

/** Curves of the reward chart and of reward models. */
const ownRewards: ReadonlySet<string> = new Set(['reward.mean', 'reward.model', 'reward.accuracy', 'reward.margin']);

/** Of a reward with several terms: their metrics have the names that the configuration gives. */
const rewardTerms = (rows: readonly MetricsRow[]): ChartDefinition => ({
  title: 'Reward terms',
  note: 'Each term of the reward, without its weight.',
  metrics: Object.fromEntries(
    metricNames(rows)
      .filter((name) => name.startsWith('reward.') && !ownRewards.has(name))
      .map((name) => [name, name.slice('reward.'.length)]),
  ),
});

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
function foldTail(series: readonly Series[], count: number): Series[] {
  if (series.length <= count) return [...series];
  const sums = new Map<number, number>();
  for (const { points } of series.slice(count - 1)) {
    for (const { step, value } of points) sums.set(step, (sums.get(step) ?? 0) + value);
  }
  const points = [...sums].map(([step, value]) => ({ step, value })).sort((a, b) => a.step - b.step);
  return [...series.slice(0, count - 1), { key: 'seconds.others', label: 'others', points }];
}

/** Without the series that repeat an earlier one, point for point. */
export function distinct(series: readonly Series[]): Series[] {
  const seen = new Set<string>();
  return series.filter(({ points }) => {
    const content = JSON.stringify(points);
    return !seen.has(content) && seen.add(content);
  });
}

/** The charts of a run, in reading order. */
export function chartsOf(rows: readonly MetricsRow[]): ChartSpec[] {
  const charts: ChartSpec[] = [];
  const surrogate = rows.some((row) => 'policy.loss' in row);
  const [reward, ...others] = definitions;
  for (const { metrics, ...definition } of [reward!, rewardTerms(rows), ...others]) {
    // The loss of a policy is its surrogate, which has a chart of its own.
    if (surrogate && 'loss' in metrics) continue;
    const series = Object.entries(metrics).flatMap(([key, label]) => [
      seriesOf(rows, key, label),
      { ...seriesOf(rows, `eval.${key}`, `${label}, evaluation`), sparse: true },
    ]);
    const present = distinct(series.filter(({ points }) => points.length > 0));
    if (present.length > 0) charts.push({ ...definition, kind: 'lines', series: present });
  }
  const phases = phaseSeries(rows);
  if (phases.length > 0) {
    charts.push({
      title: 'Time per step',
      note: 'By phase.',
      kind: 'stack',
      series: foldTail(phases, 7),
      fromZero: true,
      unit: 'seconds',
    });
  }
  return charts;
}

/** The metrics that a summary shows first, by what the run trains. */
export function headlineMetrics(algorithm: unknown): string[] {
  switch (algorithm) {
    case 'sft':
      return ['loss', 'eval.loss', 'gradient.norm', 'tokens'];
    case 'reward':
      return ['loss', 'eval.loss', 'eval.reward.accuracy', 'reward.accuracy', 'gradient.norm'];
    default:
      return ['reward.mean', 'kl.mean', 'response.length', 'value.explained', 'entropy', 'policy.clipFraction'];
  }
}
