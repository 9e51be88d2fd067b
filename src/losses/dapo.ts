/**
 * What DAPO does to scores and prompts: the soft punishment of overlong answers and dynamic sampling.
 * Yu et al. 2025, arXiv:2503.14476, eq. 13 and algorithm 1.
 */
import { type Groups, groupRows } from './group-advantages.js';
import type { Numbers } from './selection.js';

export interface OverlongSettings {
  /** L_max: learned tokens at which the punishment is full. */
  readonly maxLength: number;
  /** L_cache: over this many tokens before L_max it grows; at least 1. */
  readonly cache: number;
  /** The full punishment; 1 by default. */
  readonly factor?: number | undefined;
  /** true (default): never more than `factor`; false: growing past L_max at the same slope (verl, NeMo-RL, AReaL). */
  readonly capped?: boolean | undefined;
}

/**
 * What is added to the scores of answers of so many learned tokens, at most 0: 0 up to L_max − L_cache, then
 * factor · (L_max − L_cache − length) / L_cache, and −factor beyond L_max. Dynamic sampling looks at scores without it.
 */
export function overlongPenalties(
  lengths: Numbers,
  { maxLength, cache, factor = 1, capped = true }: OverlongSettings,
): Float64Array {
  const most = capped ? 1 : Infinity;
  return Float64Array.from(lengths, (length) => {
    const excess = length - (maxLength - cache);
    return excess > 0 ? -factor * Math.min(excess / cache, most) : 0;
  });
}

/** Whether a group of scores is worth learning from. */
export type GroupFilter = (scores: readonly number[], settings: GroupFilterSettings) => boolean;

export interface GroupFilterSettings {
  /** Scores that differ by no more than this are equal; 0 by default. */
  readonly tolerance?: number | undefined;
  /** Open interval of `mean-inside`; 0 and 1 by default. */
  readonly range?: readonly [number, number] | undefined;
}

/**
 * `unequal` (DAPO): a group of one, or one whose scores are not all equal; equality is that of numbers, not a standard
 * deviation of 0, which rounding can miss. `mean-inside` (OpenRLHF): low < mean < high.
 */
export const groupFilters = {
  unequal: (scores, { tolerance = 0 }) => scores.length === 1 || Math.max(...scores) - Math.min(...scores) > tolerance,
  'mean-inside': (scores, { range: [low, high] = [0, 1] }) => {
    const mean = scores.reduce((sum, score) => sum + score, 0) / scores.length;
    return low < mean && mean < high;
  },
} satisfies Record<string, GroupFilter>;

/**
 * Ids of the groups that the filter keeps, in order of first appearance. The scores are to be those without shaping.
 */
export const informativeGroups = (
  groups: Groups,
  filter: GroupFilter = groupFilters.unequal,
  settings: GroupFilterSettings = {},
): number[] =>
  groupRows(groups)
    .filter((rows) =>
      filter(
        rows.map((row) => groups.scores[row]!),
        settings,
      ),
    )
    .map((rows) => groups.groups[rows[0]!]!);

/** Groups gathered so far; start with `emptyBuffer`. */
export interface SamplingBuffer<Group> {
  /** In the order in which they were sampled, at most the target. */
  readonly groups: readonly Group[];
  /** Rounds of generation that were needed. */
  readonly rounds: number;
  /** Groups that the filter dropped, of all rounds. */
  readonly dropped: number;
  /** Groups that passed the filter after the buffer was full. */
  readonly surplus: number;
}

/** No groups, before the first round. */
export const emptyBuffer: SamplingBuffer<never> = { groups: [], rounds: 0, dropped: 0, surplus: 0 };

/**
 * The buffer after one more round of generation: groups that `keeps` says yes to, the first `target` of them. It is
 * full when it holds `target` groups; rounds are repeated until then, or until the caller's limit.
 */
export function addRound<Group>(
  buffer: SamplingBuffer<Group>,
  round: readonly Group[],
  keeps: (group: Group) => boolean,
  target: number,
): SamplingBuffer<Group> {
  const kept = round.filter(keeps);
  const all = [...buffer.groups, ...kept];
  return {
    groups: all.slice(0, target),
    rounds: buffer.rounds + 1,
    dropped: buffer.dropped + round.length - kept.length,
    surplus: buffer.surplus + Math.max(all.length - target, 0),
  };
}
