/**
 * What an experienced eye would say about a run's curves. Each rule reads summaries of metrics and is silent when a run
 * lacks them. Thresholds are rules of thumb of PPO practice, not guarantees.
 */
import { formatNumber } from './numbers.js';
import type { RunRecord } from './run-record.js';
import { type SeriesSummary, seriesOf, summarise } from './series.js';

export interface Hint {
  level: 'good' | 'notice' | 'warning';
  text: string;
}

type Lookup = (key: string) => SeriesSummary | undefined;
type Rule = (metric: Lookup, run: RunRecord) => Hint | undefined;

const percent = (share: number) => `${formatNumber(share * 100, 3)} %`;

const rules: readonly Rule[] = [
  (metric) => {
    const mismatch = metric('mismatch.max');
    const tokens = metric('mismatch.tokens');
    if (!mismatch) return undefined;
    if (mismatch.maximum > 0) {
      return {
        level: 'warning',
        text: `rollout and trainer disagree by up to ${formatNumber(mismatch.maximum)} in log-probability: the run optimises another policy than it samples`,
      };
    }
    const counted = tokens ? ` on about ${formatNumber(tokens.end, 3)} tokens a step` : '';
    return {
      level: 'good',
      text: `rollout and trainer gave equal log-probabilities, bit for bit,${counted} in every step`,
    };
  },
  (metric) => {
    const reward = metric('reward.mean');
    if (!reward || reward.count < 5) return undefined;
    const gain = reward.end - reward.start;
    const peakLoss = reward.maximum - reward.end;
    if (gain > 0 && peakLoss > 2 * Math.max(gain, 1e-9) && reward.count >= 20) {
      return {
        level: 'warning',
        text: `reward fell back to ${formatNumber(reward.end)} from a peak of ${formatNumber(reward.maximum)}: lower the learning rate or raise ppo.klCoefficient`,
      };
    }
    const direction = gain > 0 ? 'rose' : 'did not rise:';
    return {
      level: gain > 0 ? 'good' : 'warning',
      text: `reward ${direction} ${gain > 0 ? 'from ' : ''}${formatNumber(reward.start)} to ${formatNumber(reward.end)}`,
    };
  },
  (metric) => {
    const kl = metric('kl.mean');
    if (!kl || (kl.end <= 15 && kl.end >= -0.1)) return undefined;
    if (kl.end < 0) {
      return {
        level: 'notice',
        text: `the KL estimate is ${formatNumber(kl.end)}, below zero: samples do not come from the policy itself (rollout.topP, rollout.topK), or are too few`,
      };
    }
    return {
      level: 'warning',
      text: `KL reached ${formatNumber(kl.end)}: the policy is far from its reference; read the samples before trusting the reward`,
    };
  },
  (metric) => {
    const clip = metric('policy.clipFraction');
    if (!clip || clip.end <= 0.3) return undefined;
    return {
      level: 'warning',
      text: `${percent(clip.end)} of tokens are clipped: lower the learning rate or ppo.epochs`,
    };
  },
  (metric) => {
    const explained = metric('value.explained');
    if (!explained || explained.count < 10 || explained.end >= 0) return undefined;
    return {
      level: 'warning',
      text: `the critic explains ${formatNumber(explained.end)} of the returns' variance, worse than their mean: raise the critic's learning rate or warm it up`,
    };
  },
  (metric) => {
    const truncated = metric('response.truncated');
    if (!truncated || truncated.end <= 0.2) return undefined;
    return {
      level: 'notice',
      text: `${percent(truncated.end)} of responses reach rollout.maxNewTokens: raise it, or set rollout.truncation`,
    };
  },
  (metric) => {
    const length = metric('response.length');
    if (!length || length.count < 10 || length.start <= 0 || length.end < 2 * length.start) return undefined;
    return {
      level: 'notice',
      text: `responses grew from ${formatNumber(length.start)} to ${formatNumber(length.end)} tokens: check that the reward does not pay for length`,
    };
  },
  (metric) => {
    const entropy = metric('entropy');
    if (!entropy || entropy.start <= 0 || entropy.end > 0.1 * entropy.start) return undefined;
    return {
      level: 'notice',
      text: `entropy fell from ${formatNumber(entropy.start)} to ${formatNumber(entropy.end)}: little is left to explore`,
    };
  },
  (metric) => {
    const norm = metric('gradient.norm');
    if (!norm || norm.count < 10 || norm.maximum <= 20 * Math.max(norm.end, norm.start)) return undefined;
    return { level: 'notice', text: `the gradient norm spiked to ${formatNumber(norm.maximum)}` };
  },
  (metric, { config }) => {
    const [loss, held] = [metric('loss'), metric('eval.loss')];
    if (config.algorithm === 'ppo' || !held || held.count < 3 || held.end <= held.minimum * 1.02) return undefined;
    const trained = loss ? ` while the training loss went to ${formatNumber(loss.end)}` : '';
    return {
      level: 'notice',
      text: `the evaluation loss rose again, from ${formatNumber(held.minimum)} to ${formatNumber(held.end)}${trained}: the model begins to overfit`,
    };
  },
  (metric, { config }) => {
    const loss = metric('loss');
    if (config.algorithm === 'ppo' || !loss || loss.count < 5) return undefined;
    const fell = loss.end < loss.start;
    return {
      level: fell ? 'good' : 'warning',
      text: `the loss ${fell ? 'fell' : 'did not fall'}: ${formatNumber(loss.start)} to ${formatNumber(loss.end)}`,
    };
  },
  (_, { unreadableLines }) =>
    unreadableLines > 0
      ? { level: 'notice', text: `${unreadableLines} line(s) of metrics.jsonl are cut or damaged and were left out` }
      : undefined,
];

/** Warnings first. */
export function healthHints(run: RunRecord): Hint[] {
  const lookup: Lookup = (key) => summarise(seriesOf(run.rows, key));
  const order = { warning: 0, notice: 1, good: 2 };
  return rules.flatMap((rule) => rule(lookup, run) ?? []).sort((a, b) => order[a.level] - order[b.level]);
}
