/** Numbers of an iteration under the names of the metrics contract. */
import type { KlPenalty } from '../losses/kl.js';
import { explainedVariance, mean } from '../losses/statistics.js';
import type { Experience, Rewards, Rollout, UpdateStatistics } from './algorithm.js';
import { penalty, spans, type TruncationSettings } from './rollout.js';

export type Metrics = Readonly<Record<string, number>>;

/**
 * `reward.mean`: score with the truncation penalty, over the rows that are learned from, absent when there are none;
 * `reward.model`: score as it was given, whatever gave it, over all rows; `reward.<name>`: of one of several terms, in the place
 * of the former when the name is `model`; `response.length` in tokens; `response.truncated` and `response.empty` as fractions of
 * rows.
 */
export function rolloutMetrics(rollout: Rollout, rewards: Rewards, settings: TruncationSettings): Metrics {
  const rows = Array.from(rollout.finish.keys());
  const counted = rows.filter((row) => settings.truncation !== 'mask' || rollout.finish[row] !== 'length');
  const lengths = spans(rollout).map(
    ({ begin, end }) => rollout.responseMask.subarray(begin, end).filter(Boolean).length,
  );
  return {
    ...(counted.length > 0
      ? { 'reward.mean': mean(counted.map((row) => rewards.scores[row]! - penalty(rollout, row, settings))) }
      : {}),
    'reward.model': mean(Array.from(rewards.scores)),
    ...termMetrics('reward', rewards),
    'response.length': mean(lengths),
    'response.truncated': mean(rollout.finish.map((finish) => (finish === 'length' ? 1 : 0))),
    'response.empty': mean(lengths.map((length) => (length === 0 ? 1 : 0))),
  };
}

/** `cost.mean`: of the costs that the constraint is about; `cost.<name>`: of one of several terms. */
export const costMetrics = (costs: Rewards): Metrics => ({
  'cost.mean': mean(costs.scores),
  ...termMetrics('cost', costs),
});

/** The mean of each of several terms, without its weight. */
const termMetrics = (kind: 'reward' | 'cost', { terms = {} }: Rewards): Metrics =>
  Object.fromEntries(Object.entries(terms).map(([name, scores]) => [`${kind}.${name}`, mean(scores)]));

/** `kl.mean` in nats per token, `kl.sequence` in nats per answer, `kl.outliers` the fraction of tokens with |d| > 10. */
export const klMetrics = ({ mean: perToken, perSequence, outliers }: KlPenalty, beta: number): Metrics => ({
  'kl.mean': perToken,
  'kl.sequence': perSequence,
  'kl.coefficient': beta,
  'kl.outliers': outliers,
});

/** `value.explained` is of the values that the rollout was judged with. */
export const criticMetrics = (
  { columns, mask }: Experience,
  { loss, gradientNorm, statistics }: UpdateStatistics,
): Metrics => ({
  'value.loss': loss,
  'value.explained': explainedVariance(columns.oldValues!, columns.returns!, mask),
  'value.clipFraction': statistics.clipFraction ?? 0,
  'value.gradientNorm': gradientNorm,
});

/**
 * `policy.loss` is the surrogate alone; `loss` has the entropy bonus and the KL loss as well. `policy.kl` and
 * `policy.clipFraction` are measured before each step, against the policy that sampled: 0 in the first step of an iteration.
 */
export const actorMetrics = ({ loss, gradientNorm, statistics }: UpdateStatistics): Metrics => ({
  loss,
  'gradient.norm': gradientNorm,
  'policy.loss': statistics.policyLoss ?? loss,
  'policy.clipFraction': statistics.clipFraction ?? 0,
  'policy.kl': statistics.kl ?? 0,
  'policy.outliers': statistics.outliers ?? 0,
  entropy: statistics.entropy ?? 0,
  ...(statistics.pretrainingLoss === undefined ? {} : { 'ptx.loss': statistics.pretrainingLoss }),
});

/** Fraction of pairs in the right order, and the mean of chosen − rejected. */
export const pairMetrics = ({ accuracy = 0, margin = 0 }: Metrics): Metrics => ({
  'reward.accuracy': accuracy,
  'reward.margin': margin,
});

/** Implicit rewards of the answers: fraction of pairs in the right order, mean difference, means. */
export const preferenceMetrics = ({ accuracy = 0, margin = 0, rewardsChosen = 0, rewardsRejected = 0 }: Metrics) => ({
  ...pairMetrics({ accuracy, margin }),
  'reward.chosen': rewardsChosen,
  'reward.rejected': rewardsRejected,
});

/** Means over either kind of answers; 0 for a kind that is not there. */
export const judgedMetrics = ({
  desirable = 0,
  rewardsDesirable = 0,
  rewardsUndesirable = 0,
  klBaseline = 0,
}: Metrics) => {
  const chosen = desirable > 0 ? rewardsDesirable / desirable : 0;
  const rejected = desirable < 1 ? rewardsUndesirable / (1 - desirable) : 0;
  return {
    'reward.chosen': chosen,
    'reward.rejected': rejected,
    'reward.margin': chosen - rejected,
    'kl.baseline': klBaseline,
  };
};
