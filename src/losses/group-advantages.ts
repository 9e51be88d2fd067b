/**
 * Advantages of answers compared with other answers to the same prompt, without a critic: one number per sequence.
 *
 * GRPO: DeepSeekMath, arXiv:2402.03300; Dr.GRPO: arXiv:2503.20783; RLOO: arXiv:2402.14740; OPO: arXiv:2505.23585;
 * MaxRL: arXiv:2602.02710; GPG: arXiv:2504.02546; pass@k: arXiv:2503.19595; REINFORCE++: arXiv:2501.03262; GDPO:
 * arXiv:2601.05242; ReMax: arXiv:2310.10505.
 */
import { LockstepError } from '../errors.js';
import { compact, expand, type Numbers, select, spread } from './selection.js';
import { moments } from './statistics.js';

/** Sequences and the prompts that they answer; arrays have one entry per sequence. */
export interface Groups {
  readonly scores: Numbers;
  /** Group id; the sequences of one prompt share it, in any order. */
  readonly groups: Numbers;
  /** Learned tokens: a sequence of 0 stays out of every statistic and gets 0. Without it all sequences are counted. */
  readonly lengths?: Numbers | undefined;
  /** Score of a greedy answer to the same prompt; `remax` reads it. */
  readonly baselines?: Numbers | undefined;
  /** Scores of each reward function; `gdpo` reads them in the place of `scores`. */
  readonly rewards?: readonly Numbers[] | undefined;
}

export interface GroupAdvantageSettings {
  /** ε beside a standard deviation or mean in a denominator; 1e-6 by default. */
  readonly epsilon?: number | undefined;
  /** A group of one has nothing to be compared with: 0 (default), or its score against mean 0 and deviation 1. */
  readonly singletons?: 'zero' | 'keep' | undefined;
  /** `grpo`: mean and deviation of the group (default), or of its other members; a deviation of 0 then divides by 1. */
  readonly baseline?: 'group' | 'others' | undefined;
  /** `grpo`, `pass@k`: divided by the deviation of the group (default), `grpo` also of the batch; or not divided. */
  readonly scale?: 'group' | 'batch' | 'none' | undefined;
  /** `gpg`: F_norm; 1 by default. */
  readonly normalizer?: number | undefined;
  /** `gdpo`: weight of each reward function; 1 by default. */
  readonly weights?: Numbers | undefined;
}

/**
 * One advantage per sequence. Errors: `LOSS_SHAPE` for arrays of different lengths, `LOSS_COLUMN` for one that is
 * absent.
 */
export type GroupAdvantage = (groups: Groups, settings?: GroupAdvantageSettings) => Float64Array;

/** Standard deviations have the divisor n − 1. In every method a group of equal scores has advantage exactly 0. */
export const groupAdvantages = {
  /** (s − mean) / (std + ε). */
  grpo,
  /** s − mean. */
  'dr-grpo': (groups, settings = {}) => byGroup(groups, settings, 1, fromMean),
  /** s − mean, to be whitened over all learned tokens: `whiten(overTokens(…), mask)`. */
  'reinforce++-baseline': (groups, settings = {}) => byGroup(groups, settings, 1, fromMean),
  /** s − mean of the other members = n / (n − 1) · (s − mean). */
  rloo: (groups, settings = {}) =>
    byGroup(groups, settings, 1, (scores) => fromMean(scores).map((x) => (x * scores.length) / (scores.length - 1))),
  opo,
  /** (s − mean) / (mean + ε). */
  maxrl: (groups, settings = {}) =>
    byGroup(groups, settings, 1, (scores) => {
      const scale = moments(scores).mean + epsilonOf(settings);
      return fromMean(scores).map((x) => x / scale);
    }),
  gpg,
  'pass@k': passAtK,
  gdpo,
  remax,
} satisfies Record<string, GroupAdvantage>;

export type GroupAdvantageName = keyof typeof groupAdvantages;

function grpo(groups: Groups, settings: GroupAdvantageSettings = {}): Float64Array {
  const { baseline = 'group', scale = 'group' } = settings;
  const epsilon = epsilonOf(settings);
  const batch = scale === 'batch' ? deviation(groupRows(groups).flatMap((rows) => pick(groups.scores, rows))) : 0;
  const divisorOf: Record<typeof scale, (variance: number) => number> = {
    group: (variance) => (variance > 0 ? Math.sqrt(variance) + epsilon : 1),
    batch: () => batch + epsilon,
    none: () => 1,
  };
  return byGroup(groups, settings, scale === 'none' ? 1 : 1 + epsilon, (scores) => {
    const group = moments(scores);
    const others = (i: number) => moments(scores.filter((_, j) => j !== i));
    const against = baseline === 'others' ? others : () => group;
    return scores.map((score, i) => {
      const { mean, variance } = against(i);
      return (score - mean) / divisorOf[scale](variance);
    });
  });
}

/** OPO: s − Σ(length · s) / Σ length. Reads `lengths`. */
function opo(groups: Groups, settings: GroupAdvantageSettings = {}): Float64Array {
  const lengths = required(groups, 'lengths');
  return byGroup(groups, settings, 1, (scores, rows) => {
    const own = pick(lengths, rows);
    const total = own.reduce((sum, length) => sum + length, 0);
    const baseline = scores.reduce((sum, score, i) => sum + own[i]! * score, 0) / total;
    return scores.map((score) => score - baseline);
  });
}

/** GPG: α (s − mean) / F_norm, α = sequences / sequences of a score that is not 0 (at least 1). */
function gpg(groups: Groups, settings: GroupAdvantageSettings = {}): Float64Array {
  const counted = groupRows(groups).flat();
  const scored = counted.filter((row) => groups.scores[row] !== 0).length;
  const scale = counted.length / Math.max(scored, 1) / (settings.normalizer ?? 1);
  return byGroup(groups, settings, 1 / scale, (scores) => fromMean(scores).map((x) => x * scale));
}

/** pass@k: the best of a group has (best − second best) / (std + ε), all others 0; equal best ones have 0. */
function passAtK(groups: Groups, settings: GroupAdvantageSettings = {}): Float64Array {
  const scaled = settings.scale !== 'none';
  const epsilon = epsilonOf(settings);
  return byGroup(groups, settings, scaled ? 1 + epsilon : 1, (scores) => {
    const [best, second] = [...scores].sort((a, b) => b - a) as [number, number];
    const by = scaled ? deviation(scores) + epsilon : 1;
    return scores.map((score) => (score === best ? (best - second) / by : 0));
  });
}

/** GDPO: Σ over reward functions of weight · GRPO of that reward, to be whitened over all learned tokens. */
function gdpo(groups: Groups, settings: GroupAdvantageSettings = {}): Float64Array {
  const rewards = required(groups, 'rewards');
  const sum = new Float64Array(groups.groups.length);
  rewards.forEach((scores, k) => {
    const weight = settings.weights?.[k] ?? 1;
    grpo({ ...groups, scores }, settings).forEach((advantage, b) => {
      sum[b]! += weight * advantage;
    });
  });
  return sum;
}

/**
 * ReMax for a score at the end of the answer: s − score of the greedy answer. Reads `baselines`; groups do not matter.
 */
function remax(groups: Groups): Float64Array {
  const baselines = required(groups, 'baselines');
  const advantages = new Float64Array(groups.scores.length);
  for (const row of groupRows(groups).flat()) advantages[row] = groups.scores[row]! - baselines[row]!;
  return advantages;
}

export interface GroupCounts {
  /** With a sequence that counts. */
  readonly groups: number;
  /** Of one sequence. */
  readonly singletons: number;
  /** Of several sequences with equal scores: no advantage, no gradient. */
  readonly equal: number;
  /** Sequences that stay out because nothing of them is learned. */
  readonly empty: number;
}

/** How many groups have nothing to teach, for metrics. */
export function groupCounts(groups: Groups): GroupCounts {
  const all = groupRows(groups);
  return {
    groups: all.length,
    singletons: all.filter((rows) => rows.length === 1).length,
    equal: all.filter((rows) => rows.length > 1 && allEqual(pick(groups.scores, rows))).length,
    empty: groups.groups.length - all.flat().length,
  };
}

/** Group ids, and any of the other arrays. */
export type GroupIds = Pick<Groups, 'groups'> & Partial<Groups>;

/** Rows of each group in order of first appearance, without those that have no learned token. Errors: `LOSS_SHAPE`. */
export function groupRows({ groups, scores, lengths, baselines, rewards = [] }: GroupIds): number[][] {
  for (const array of [scores, lengths, baselines, ...rewards]) {
    if (array && array.length !== groups.length) {
      throw new LockstepError(
        'LOSS_SHAPE',
        `Group advantages came with ${groups.length} group ids and ${array.length} numbers; give one of each per sequence.`,
        { expected: groups.length, received: array.length },
      );
    }
  }
  const rowsOf = new Map<number, number[]>();
  for (let row = 0; row < groups.length; row++) {
    if (lengths && !lengths[row]) continue;
    const rows = rowsOf.get(groups[row]!);
    if (rows) rows.push(row);
    else rowsOf.set(groups[row]!, [row]);
  }
  return [...rowsOf.values()];
}

/** Each sequence's number at each of its learned tokens; packed, 0 where the mask is 0. */
export function overTokens(perSequence: Numbers, lengths: Numbers, mask: Numbers): Float64Array {
  const selection = select(lengths, mask);
  if (perSequence.length !== lengths.length) {
    throw new LockstepError(
      'LOSS_SHAPE',
      `${perSequence.length} numbers came with ${lengths.length} sequences; give one number per sequence.`,
      { expected: lengths.length, received: perSequence.length },
    );
  }
  const data = new Float64Array(selection.positions.length);
  spread(selection.starts, Float64Array.from(perSequence), data);
  return expand(selection, data);
}

/** Packed sequences and the prompt of each. */
export interface PromptBatch {
  readonly lengths: Numbers;
  readonly mask: Numbers;
  /** Group id of each sequence; the sequences of one prompt share it, in any order. */
  readonly groups: Numbers;
}

/**
 * Weights under which the sum of all losses is the mean over prompts of each prompt's token mean (SkyRL): 1 / (prompts ·
 * learned tokens of the prompt), packed, 0 where the mask is 0. A prompt without a learned token is not counted.
 *
 * Made over a whole mini-batch, they are the column `weights` of a `weighted` policy loss with the aggregation
 * `token-sum`, however its rows are split. The entropy bonus and the KL loss have no weights.
 */
export function promptMeanWeights({ lengths, mask, groups }: PromptBatch): Float64Array {
  const { starts } = select(lengths, mask);
  const learned = Array.from({ length: lengths.length }, (_, b) => starts[b + 1]! - starts[b]!);
  const prompts = groupRows({ groups, lengths: learned });
  const weights = new Float64Array(lengths.length);
  for (const rows of prompts) {
    const tokens = rows.reduce((sum, row) => sum + learned[row]!, 0);
    for (const row of rows) weights[row] = 1 / (prompts.length * tokens);
  }
  return overTokens(weights, lengths, mask);
}

/** Packed per-token rewards. */
export interface TokenRewards {
  readonly lengths: Numbers;
  readonly mask: Numbers;
  readonly rewards: Numbers;
}

/**
 * REINFORCE++: G_t = r_t + γ G_next, where next is the next learned token of the sequence; packed, 0 where the mask is
 * 0. Gaps are stepped over without a discount, and rewards on them are not read.
 */
export function returnsToGo({ lengths, mask, rewards }: TokenRewards, gamma: number): Float64Array {
  const selection = select(lengths, mask);
  const { starts } = selection;
  const returns = compact(selection, rewards);
  for (let b = 0; b + 1 < starts.length; b++) {
    for (let i = starts[b + 1]! - 2; i >= starts[b]!; i--) returns[i]! += gamma * returns[i + 1]!;
  }
  return expand(selection, returns);
}

/**
 * `advantages` of each group with several unequal scores; equal ones have 0, a lone score is kept over `loneDivisor` or
 * 0.
 */
function byGroup(
  groups: Groups,
  { singletons = 'zero' }: GroupAdvantageSettings,
  loneDivisor: number,
  advantages: (scores: readonly number[], rows: readonly number[]) => readonly number[],
): Float64Array {
  const result = new Float64Array(groups.groups.length);
  for (const rows of groupRows(groups)) {
    const scores = pick(groups.scores, rows);
    if (rows.length === 1) result[rows[0]!] = singletons === 'keep' ? scores[0]! / loneDivisor : 0;
    else if (!allEqual(scores)) {
      const values = advantages(scores, rows);
      rows.forEach((row, i) => {
        result[row] = values[i]!;
      });
    }
  }
  return result;
}

const epsilonOf = ({ epsilon = 1e-6 }: GroupAdvantageSettings): number => epsilon;
const deviation = (scores: readonly number[]): number => Math.sqrt(moments(scores).variance);
const allEqual = (scores: readonly number[]): boolean => scores.every((score) => score === scores[0]);
const pick = (x: Numbers, rows: readonly number[]): number[] => rows.map((row) => x[row]!);
function fromMean(scores: readonly number[]): number[] {
  const { mean } = moments(scores);
  return scores.map((score) => score - mean);
}

function required<Name extends 'lengths' | 'baselines' | 'rewards'>(
  groups: Groups,
  name: Name,
): NonNullable<Groups[Name]> {
  const array = groups[name];
  if (array === undefined) {
    throw new LockstepError('LOSS_COLUMN', `These group advantages need "${name}"; give it beside scores and groups.`, {
      column: name,
    });
  }
  return array as NonNullable<Groups[Name]>;
}
