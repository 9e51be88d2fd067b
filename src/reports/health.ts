/**
 * What an experienced eye would say about a run's curves. Each rule reads summaries of metrics and is silent when a run
 * lacks them, so that it speaks of every algorithm that has them. Thresholds are rules of thumb, not guarantees.
 */
import { formatNumber } from './numbers.js';
import { hasTeacher, type RunRecord, settingOf } from './run-record.js';
import { type SeriesSummary, seriesOf, summarise } from './series.js';

export interface Hint {
  level: 'good' | 'notice' | 'warning';
  text: string;
}

type Lookup = (key: string) => SeriesSummary | undefined;
type Rule = (metric: Lookup, run: RunRecord) => Hint | undefined;

const percent = (share: number) => `${formatNumber(share * 100, 3)} %`;
const fromTo = ({ start, end }: SeriesSummary) => `from ${formatNumber(start)} to ${formatNumber(end)}`;
/** ` or lower ppo.epochs`, of an algorithm that has the setting. */
const orSet = (run: RunRecord, verb: 'raise' | 'lower', key: string): string => {
  const setting = settingOf(run, key);
  return setting ? ` or ${verb} ${setting.path}` : '';
};

/** Of all algorithms. */
const ofRuns: readonly Rule[] = [
  (metric) => {
    const norm = metric('gradient.norm');
    if (!norm || norm.count < 10 || norm.maximum <= 20 * Math.max(norm.end, norm.start)) return undefined;
    return { level: 'notice', text: `the gradient norm spiked to ${formatNumber(norm.maximum)}` };
  },
  (_, { unreadableLines }) =>
    unreadableLines > 0
      ? { level: 'notice', text: `${unreadableLines} line(s) of metrics.jsonl are cut or damaged and were left out` }
      : undefined,
];

/** Of a policy that learns from what it samples. Its loss is a surrogate and says nothing about progress. */
const ofRollouts: readonly Rule[] = [
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
  (metric, run) => {
    const reward = metric('reward.mean');
    if (!reward || reward.count < 5) return undefined;
    const gain = reward.end - reward.start;
    const peakLoss = reward.maximum - reward.end;
    if (gain > 0 && peakLoss > 2 * Math.max(gain, 1e-9) && reward.count >= 20) {
      return {
        level: 'warning',
        text: `reward fell back to ${formatNumber(reward.end)} from a peak of ${formatNumber(reward.maximum)}: lower the learning rate${orSet(run, 'raise', 'klCoefficient')}`,
      };
    }
    if (gain > 0) return { level: 'good', text: `reward rose ${fromTo(reward)}` };
    const cost = metric('cost.mean');
    const text = `reward did not rise: ${formatNumber(reward.start)} to ${formatNumber(reward.end)}`;
    // A constraint that is not met comes first.
    return cost && cost.end < cost.start ? { level: 'notice', text } : { level: 'warning', text };
  },
  (metric, run) => {
    const cost = metric('cost.mean');
    if (!cost || cost.count < 5) return undefined;
    const { threshold } = (settingOf(run, 'constraint')?.value ?? {}) as { threshold?: number };
    if (threshold !== undefined && cost.end <= threshold) {
      return {
        level: 'good',
        text: `the cost is ${formatNumber(cost.end)}, within its threshold of ${formatNumber(threshold)}`,
      };
    }
    const fell = cost.end < cost.start;
    const limit = threshold === undefined ? '' : `; its threshold is ${formatNumber(threshold)}`;
    return {
      level: fell ? 'good' : 'warning',
      text: `the cost ${fell ? 'fell' : 'did not fall'}: ${formatNumber(cost.start)} to ${formatNumber(cost.end)}${limit}`,
    };
  },
  (metric, run) => {
    const kl = metric('kl.mean');
    if (!kl || kl.end < -0.1 || !hasTeacher(run) || kl.count < 5) return undefined;
    const fell = kl.end < kl.start;
    return {
      level: fell ? 'good' : 'warning',
      text: `the KL to the teacher ${fell ? 'fell' : 'did not fall'}: ${formatNumber(kl.start)} to ${formatNumber(kl.end)} a token`,
    };
  },
  (metric, run) => {
    const kl = metric('kl.mean');
    if (!kl || kl.end <= 3 || hasTeacher(run)) return undefined;
    return {
      level: 'warning',
      text: `KL reached ${formatNumber(kl.end)} a token: the policy is far from its reference; read the samples before trusting the reward`,
    };
  },
  (metric) => {
    const kl = metric('kl.mean');
    if (!kl || kl.end >= -0.1) return undefined;
    return {
      level: 'notice',
      text: `the KL estimate is ${formatNumber(kl.end)}, below zero: samples do not come from the policy itself (rollout.topP, rollout.topK), or are too few`,
    };
  },
  (metric, run) => {
    const equal = metric('groups.equal');
    const groups = groupsOf(run);
    if (!equal || !groups || equal.end <= 0.5 * groups) return undefined;
    return {
      level: 'notice',
      text: `the responses of ${percent(equal.end / groups)} of the prompts all score the same and teach nothing: choose prompts that are neither too easy nor too hard${orSet(run, 'raise', 'samplingRounds')}`,
    };
  },
  (metric, run) => {
    const rounds = metric('groups.rounds');
    const most = settingOf(run, 'samplingRounds');
    if (!rounds || !most || rounds.end < Number(most.value)) return undefined;
    return {
      level: 'notice',
      text: `dynamic sampling takes all ${formatNumber(rounds.end)} rounds of ${most.path}: too few prompts have responses of different scores`,
    };
  },
  (metric, run) => {
    const clip = metric('policy.clipFraction');
    if (!clip || clip.end <= 0.3) return undefined;
    return {
      level: 'warning',
      text: `${percent(clip.end)} of tokens are clipped: lower the learning rate${orSet(run, 'lower', 'epochs')}`,
    };
  },
  (metric) => {
    const explained = metric('value.explained');
    if (!explained || explained.count < 10 || explained.end >= 0) return undefined;
    return {
      level: 'warning',
      text: `the critic explains ${formatNumber(explained.end)} of the returns' variance, worse than their mean: raise critic.optimizer.learningRate or warm it up`,
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
    const empty = metric('response.empty');
    if (!empty || empty.end <= 0.2) return undefined;
    return {
      level: 'warning',
      text: `${percent(empty.end)} of responses are empty: the policy ends before it answers`,
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
      text: `entropy fell ${fromTo(entropy)}: little is left to explore`,
    };
  },
];

/** Of a model that learns from rows, which the names of its metrics tell from a policy that samples. */
const ofRows: readonly Rule[] = [
  (metric) => {
    if (metric('policy.loss')) return undefined;
    const [accuracy, what] = heldOut(metric, 'reward.accuracy');
    if (!accuracy) return undefined;
    if (accuracy.end <= 0.5) {
      return { level: 'warning', text: `${what}accuracy is ${percent(accuracy.end)}: no better than chance` };
    }
    const rose = accuracy.end > accuracy.start;
    const change = `${percent(accuracy.start)} to ${percent(accuracy.end)}`;
    return { level: rose ? 'good' : 'notice', text: `${what}accuracy ${rose ? 'rose' : 'did not rise'}: ${change}` };
  },
  (metric) => {
    if (metric('policy.loss')) return undefined;
    const [margin, what] = heldOut(metric, 'reward.margin');
    if (!margin) return undefined;
    const rose = margin.end > margin.start;
    const change = `${formatNumber(margin.start)} to ${formatNumber(margin.end)}`;
    return { level: rose ? 'good' : 'warning', text: `${what}margin ${rose ? 'rose' : 'did not rise'}: ${change}` };
  },
  (metric) => {
    const [chosen, margin] = [metric('reward.chosen'), metric('reward.margin')];
    if (!chosen || !margin || chosen.count < 10) return undefined;
    if (chosen.start - chosen.end <= Math.max(margin.end - margin.start, 0)) return undefined;
    return {
      level: 'notice',
      text: `the reward of the chosen answers fell ${fromTo(chosen)}, by more than the margin grew: the policy makes them less likely, too; lower the learning rate`,
    };
  },
  (metric) => {
    const [loss, held] = [metric('loss'), metric('eval.loss')];
    if (metric('policy.loss') || !held || held.count < 3 || held.end <= held.minimum * 1.02) return undefined;
    const trained = loss ? ` while the training loss went to ${formatNumber(loss.end)}` : '';
    return {
      level: 'notice',
      text: `the evaluation loss rose again, from ${formatNumber(held.minimum)} to ${formatNumber(held.end)}${trained}: the model begins to overfit`,
    };
  },
  (metric) => {
    const loss = metric('loss');
    // Where answers are compared, their margin says more.
    if (metric('policy.loss') || metric('reward.margin') || !loss || loss.count < 5) return undefined;
    const fell = loss.end < loss.start;
    return {
      level: fell ? 'good' : 'warning',
      text: `the loss ${fell ? 'fell' : 'did not fall'}: ${formatNumber(loss.start)} to ${formatNumber(loss.end)}`,
    };
  },
];

/** A metric on held-out rows when there are several evaluations, else on those learned from; and what to call it. */
function heldOut(metric: Lookup, key: string): [SeriesSummary | undefined, string] {
  const held = metric(`eval.${key}`);
  if (held && held.count >= 2) return [held, 'held-out '];
  const trained = metric(key);
  return [trained && trained.count >= 5 ? trained : undefined, 'the '];
}

/** Prompts of a step. */
function groupsOf({ config }: RunRecord): number | undefined {
  const { batch, rollout } = config as { batch?: { sequences?: number }; rollout?: { samples?: number } };
  return batch?.sequences && rollout?.samples ? batch.sequences / rollout.samples : undefined;
}

/** Warnings first. */
export function healthHints(run: RunRecord): Hint[] {
  const lookup: Lookup = (key) => summarise(seriesOf(run.rows, key));
  const order = { warning: 0, notice: 1, good: 2 };
  return [...ofRollouts, ...ofRows, ...ofRuns]
    .flatMap((rule) => rule(lookup, run) ?? [])
    .sort((a, b) => order[a.level] - order[b.level]);
}
