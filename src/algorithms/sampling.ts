/**
 * Sampling of groups of answers. Dynamic sampling: groups whose answers all score the same teach nothing, and answers to other
 * prompts take their place. DAPO: Yu et al. 2025, arXiv:2503.14476, eq. 11 and section 3.2.
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

/** The rows of one prompt in a round, and whether some with a learned token score unequally. */
interface Group {
  readonly round: { readonly rollout: Rollout; readonly rewards: Rewards };
  readonly rows: readonly number[];
  readonly teaches: boolean;
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
      return { round: { rollout, rewards }, rows, teaches: new Set(scores).size > 1 };
    });
  };
  const first = await sampleRound(prompts, 0);
  if (samplingRounds === 1 || !draw) return { ...first[0]!.round, dropped: 0, rounds: 1 };
  const groups = first.filter(({ teaches }) => teaches);
  let [tried, rounds] = [first.length, 1];
  while (groups.length < target && rounds < samplingRounds) {
    const round = await sampleRound(await draw(target - groups.length), rounds);
    groups.push(...round.filter(({ teaches }) => teaches));
    tried += round.length;
    rounds++;
  }
  // With nothing to learn from, the first round is learned from as it is: every advantage is 0.
  if (groups.length === 0) return { ...first[0]!.round, dropped: tried - target, rounds };
  return { ...joinGroups(groups), dropped: tried - groups.length, rounds };
}

function joinGroups(groups: readonly Group[]): { rollout: Rollout; rewards: Rewards } {
  const rollout = joinRows(groups.map(({ round, rows }) => ({ rollout: round.rollout, rows })));
  const join = (scoresOf: (rewards: Rewards) => Float64Array) =>
    Float64Array.from(groups.flatMap(({ round, rows }) => rows.map((row) => scoresOf(round.rewards)[row]!)));
  const names = Object.keys(groups[0]!.round.rewards.terms ?? {});
  const terms = Object.fromEntries(names.map((name) => [name, join((rewards) => rewards.terms![name]!)]));
  return { rollout, rewards: { scores: join(({ scores }) => scores), ...(names.length > 0 ? { terms } : {}) } };
}
