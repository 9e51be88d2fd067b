/**
 * Sampling of groups of answers. Dynamic sampling: groups whose answers all score the same teach nothing, and answers to other
 * prompts take their place. DAPO: Yu et al. 2025, arXiv:2503.14476, eq. 11 and algorithm 1.
 */
import type { ActorWorker, Context, Prompt, Rewards, RewardWorker, Rollout } from './algorithm.js';
import { joinRows, learnedMask, sumsBySequence, type TruncationSettings } from './rollout.js';

export interface SamplingSettings extends TruncationSettings {
  /** Answers per prompt. */
  readonly samples: number;
  /** Most rounds in which groups of equal scores are replaced by those of other prompts; 1: they stay. */
  readonly samplingRounds: number;
}

export interface SampledGroups {
  readonly rollout: Rollout;
  readonly rewards: Rewards;
  /** Groups that were sampled and left out, and the rounds that it took. */
  readonly dropped: number;
  readonly rounds: number;
}

/** The rows of one prompt in a round. */
interface Group {
  readonly round: { readonly rollout: Rollout; readonly rewards: Rewards };
  readonly rows: readonly number[];
  readonly teaches: boolean;
}

/**
 * Whether a group of so many samples teaches, by the scores of those with a learned token: not all are equal (eq. 11). A prompt
 * with one sample is not compared with anything, and stays.
 */
export const teaches = (scores: readonly number[], samples: number): boolean =>
  samples === 1 || new Set(scores).size > 1;

/**
 * Algorithm 1: rounds of groups until so many teach, or until the last round. `sampleRound` is told how many are missing, and the
 * number of the round from 0; what it has beyond them is left over, and `dropped` counts those that do not teach.
 */
export async function fillGroups<G extends { readonly teaches: boolean }>(
  target: number,
  mostRounds: number,
  sampleRound: (missing: number, round: number) => Promise<readonly G[]>,
): Promise<{ groups: readonly G[]; rounds: number; dropped: number }> {
  const groups: G[] = [];
  let [rounds, dropped] = [0, 0];
  while (groups.length < target && rounds < mostRounds) {
    const round = await sampleRound(target - groups.length, rounds++);
    const kept = round.filter((group) => group.teaches);
    groups.push(...kept.slice(0, target - groups.length));
    dropped += round.length - kept.length;
  }
  return { groups, rounds, dropped };
}

/** With several rounds, as many groups as prompts that teach, or those found until the last round. */
export async function sampleGroups(
  actor: ActorWorker,
  reward: RewardWorker,
  prompts: readonly Prompt[],
  { iteration, draw }: Context,
  { samples, samplingRounds, ...truncation }: SamplingSettings,
): Promise<SampledGroups> {
  const target = prompts.length / samples;
  const sampleRound = async (asked: readonly Prompt[], round: number): Promise<Group[]> => {
    const sampled = actor.generateSequences(asked, { iteration, round });
    const [rollout, rewards] = await Promise.all([sampled, reward.computeRewards(sampled)]);
    const learned = sumsBySequence(rollout, learnedMask(rollout, truncation));
    return Array.from({ length: asked.length / samples }, (_, g) => {
      const rows = Array.from({ length: samples }, (_, i) => g * samples + i);
      const scores = rows.filter((row) => learned[row]! > 0).map((row) => rewards.scores[row]!);
      return { round: { rollout, rewards }, rows, teaches: teaches(scores, samples) };
    });
  };
  const first = await sampleRound(prompts, 0);
  if (samplingRounds === 1 || !draw) return { ...first[0]!.round, dropped: 0, rounds: 1 };
  const { groups, rounds, dropped } = await fillGroups(target, samplingRounds, async (missing, round) =>
    round === 0 ? first : sampleRound(await draw(missing), round),
  );
  // With nothing to learn from, the first round is learned from as it is: every advantage is 0.
  if (groups.length === 0) return { ...first[0]!.round, dropped: dropped - target, rounds };
  return { ...joinGroups(groups), dropped, rounds };
}

function joinGroups(groups: readonly Group[]): { rollout: Rollout; rewards: Rewards } {
  const rollout = joinRows(groups.map(({ round, rows }) => ({ rollout: round.rollout, rows })));
  const join = (scoresOf: (rewards: Rewards) => Float64Array) =>
    Float64Array.from(groups.flatMap(({ round, rows }) => rows.map((row) => scoresOf(round.rewards)[row]!)));
  const names = Object.keys(groups[0]!.round.rewards.terms ?? {});
  const terms = Object.fromEntries(names.map((name) => [name, join((rewards) => rewards.terms![name]!)]));
  return { rollout, rewards: { scores: join(({ scores }) => scores), ...(names.length > 0 ? { terms } : {}) } };
}
