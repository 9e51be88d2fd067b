/** Which metrics make which chart, and what to say about them. Metrics that a run lacks leave no empty chart. */
import type { MetricsRow } from '../train/events.js';
import { foldTail, phaseSeries } from './phases.js';
import { hasTeacher, hasTermNamedModel, type RunRecord } from './run-record.js';
import { metricNames, type Series, type SeriesSummary, seriesOf } from './series.js';

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
  /** Left out while no value changes. */
  varying?: boolean;
  /** Of a student, whose metrics compare it with its teacher. */
  taught?: { title: string; note: string };
}

/** What is paid and what it costs. The terms of either follow, under the names that the configuration gives. */
const rewardsOf = (run: Pick<RunRecord, 'config'>): ChartDefinition => ({
  title: 'Reward',
  note: 'What the policy is paid per response. It should rise, then level off.',
  metrics: {
    'reward.mean': 'reward',
    ...(hasTermNamedModel(run) ? {} : { 'reward.model': 'before rollout.truncation' }),
    'reward.greedy': 'greedy response',
  },
  taught: {
    title: 'Reward',
    note: 'How much likelier the teacher finds a response than the student. It should rise to 0.',
  },
});
const costs: readonly ChartDefinition[] = [
  {
    title: 'Cost',
    note: 'What a response costs. It should fall to the threshold of the constraint.',
    metrics: { 'cost.mean': 'cost' },
  },
  {
    title: 'Cost multiplier',
    note: 'Weight of the cost against the reward. A rise to its maximum means that the constraint is not met.',
    metrics: { 'cost.multiplier': 'multiplier' },
    fromZero: true,
    exact: true,
  },
];

const others: readonly ChartDefinition[] = [
  {
    title: 'Loss',
    note: 'Of the weights before each update.',
    metrics: { loss: 'loss' },
  },
  {
    title: 'Accuracy',
    note: 'Share of pairs in the right order: by score, or by how much likelier the policy made either answer.',
    metrics: { 'reward.accuracy': 'accuracy' },
  },
  {
    title: 'Margin',
    note: 'How far the better answers are ahead of the others, in score or in implicit reward.',
    metrics: { 'reward.margin': 'margin' },
  },
  {
    title: 'Rewards of the answers',
    note: 'Their log-likelihood, against the reference where there is one. Where both fall, other answers gain.',
    metrics: { 'reward.chosen': 'chosen', 'reward.rejected': 'rejected' },
  },
  {
    title: 'KL to the reference',
    note: 'Per token: how far the policy has moved from where it started. A run-away curve means that it exploits the reward.',
    metrics: { 'kl.mean': 'KL' },
    taught: {
      title: 'KL to the teacher',
      note: 'Per token: how far the student is from its teacher. It should fall to 0.',
    },
  },
  {
    title: 'KL per response',
    note: 'Summed over the tokens of a response.',
    metrics: { 'kl.sequence': 'KL', 'kl.baseline': "KTO's baseline" },
  },
  {
    title: 'KL coefficient',
    note: 'Weight of the KL term, where a controller steers it.',
    metrics: { 'kl.coefficient': 'coefficient' },
    ...{ fromZero: true, exact: true, varying: true },
  },
  {
    title: 'Groups without a difference',
    note: 'Prompts of a step whose responses all have the same score: nothing is learned from them.',
    metrics: { 'groups.equal': 'groups' },
    fromZero: true,
  },
  {
    title: 'Dynamic sampling',
    note: 'Groups that were sampled and left out, and the rounds that a step took.',
    metrics: { 'groups.dropped': 'groups left out', 'groups.rounds': 'rounds' },
    fromZero: true,
  },
  {
    title: 'Value loss',
    note: 'Error of the critic.',
    metrics: { 'value.loss': 'of rewards', 'cost.value.loss': 'of costs' },
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
    title: 'Empty responses',
    note: 'Share without a token.',
    metrics: { 'response.empty': 'empty' },
    ...{ fromZero: true, varying: true },
  },
  {
    title: 'Unknown tokens',
    note: 'Sampled tokens that the tokenizer does not have.',
    metrics: { 'response.unknown': 'unknown' },
    fromZero: true,
    unit: 'tokens',
  },
  {
    title: 'KL within an update',
    note: 'Per token, between the policy that sampled and the policy before each optimizer step: mean over the steps, of which the first has 0.',
    metrics: { 'policy.kl': 'KL' },
    varying: true,
  },
  {
    title: 'Policy loss',
    note: 'The surrogate whose gradient is taken. It has no trend to expect: read the reward.',
    metrics: { 'policy.loss': 'policy loss' },
  },
  {
    title: 'Clip fraction',
    note: 'Share of tokens whose loss the clip changes, measured before each optimizer step: mean over the steps, of which the first has 0. Above 0.3, lower the learning rate.',
    metrics: { 'policy.clipFraction': 'policy', 'value.clipFraction': 'critic' },
    ...{ fromZero: true, varying: true },
  },
  {
    title: 'Outliers',
    note: 'Share of tokens whose log-ratio is beyond any useful range.',
    metrics: { 'policy.outliers': 'to the policy that sampled', 'kl.outliers': 'to the reference' },
    ...{ fromZero: true, varying: true },
  },
  {
    title: 'Entropy',
    note: 'Of the policy, per token. A collapse to 0 ends exploration.',
    metrics: { entropy: 'entropy' },
    fromZero: true,
  },
  {
    title: 'Pretraining loss',
    note: 'Of the texts that are imitated in the same steps (ptx). A rise means that the policy forgets them.',
    metrics: { 'ptx.loss': 'loss' },
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
    title: 'Guessed tokens per step',
    note: 'With rollout.speculation: tokens that were guessed, and those of them that were what the policy sampled. Each of these saved a step of its answer.',
    metrics: { 'speculation.tokens': 'guessed', 'speculation.accepted': 'right' },
    ...{ fromZero: true, exact: true },
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
  {
    title: 'Data that came to the program',
    note: 'Answers of workers that the algorithm awaited. All others go from worker to worker.',
    metrics: { 'bytes.materialised': 'materialised' },
    ...{ fromZero: true, exact: true },
    unit: 'bytes',
  },
];

/** Of a reward or a cost with several terms: the metrics under it that have no chart of their own. */
const terms = (kind: 'reward' | 'cost', rows: readonly MetricsRow[], own: ReadonlySet<string>): ChartDefinition => ({
  title: `${kind === 'reward' ? 'Reward' : 'Cost'} terms`,
  note: `Each term of the ${kind}, without its weight.`,
  metrics: Object.fromEntries(
    metricNames(rows)
      .map((name) => name.replace(/^eval\./, ''))
      .filter((name) => name.startsWith(`${kind}.`) && !own.has(name))
      .map((name) => [name, name.slice(kind.length + 1)]),
  ),
});

/** Without the series that repeat an earlier one, point for point. */
export function distinct(series: readonly Series[]): Series[] {
  const seen = new Set<string>();
  return series.filter(({ points }) => {
    const content = JSON.stringify(points);
    return !seen.has(content) && seen.add(content);
  });
}

const changes = ({ points }: Series): boolean => points.some(({ value }) => value !== points[0]!.value);

/** The charts of a run, in reading order. */
export function chartsOf(run: Pick<RunRecord, 'rows' | 'config'>): ChartSpec[] {
  const { rows } = run;
  const charts: ChartSpec[] = [];
  const surrogate = rows.some((row) => 'policy.loss' in row);
  const rewards = rewardsOf(run);
  const own = new Set([rewards, ...costs, ...others].flatMap(({ metrics }) => Object.keys(metrics)));
  const definitions = [rewards, terms('reward', rows, own), ...costs, terms('cost', rows, own), ...others];
  for (const { metrics, varying, taught, ...definition } of definitions) {
    // The loss of a policy that samples is its surrogate, which has a chart of its own.
    if (surrogate && 'loss' in metrics) continue;
    const series = Object.entries(metrics).flatMap(([key, label]) => [
      seriesOf(rows, key, label),
      { ...seriesOf(rows, `eval.${key}`, `${label}, evaluation`), sparse: true },
    ]);
    const present = distinct(series.filter(({ points }) => points.length > 0));
    if (present.length === 0 || (varying && !present.some(changes))) continue;
    charts.push({ ...definition, ...(hasTeacher(run) ? taught : {}), kind: 'lines', series: present });
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

/** Of a policy that learns from what it samples: what it is paid, what that takes, and what would go wrong first. */
const ofRollouts = [
  ...['reward.mean', 'cost.mean', 'cost.multiplier', 'reward.greedy', 'kl.mean', 'groups.equal'],
  ...['response.length', 'value.explained', 'entropy', 'policy.clipFraction'],
];
/** Of a model that learns from rows: whether it orders answers right, where there are any, and its loss. */
const ofRows = [
  ...['eval.reward.accuracy', 'reward.accuracy', 'eval.reward.margin', 'reward.margin'],
  ...['loss', 'eval.loss', 'gradient.norm', 'tokens'],
];

/** The metrics that a summary shows first, among those that a run has; a clip that changes nothing is not shown. */
export function headlineMetrics(metrics: Readonly<Record<string, SeriesSummary>>): string[] {
  const clips = (metrics['policy.clipFraction']?.maximum ?? 0) > 0;
  const names = Object.keys(metrics).filter((name) => name !== 'policy.clipFraction' || clips);
  const samples = names.some((name) => ['policy.loss', 'reward.mean', 'eval.reward.mean'].includes(name));
  return (samples ? ofRollouts : ofRows).filter((name) => names.includes(name));
}
