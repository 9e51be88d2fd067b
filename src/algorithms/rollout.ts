/** What every algorithm that learns from rollouts does with one: which tokens count, and where scores go. */
import { LockstepError } from '../errors.js';
import type { Rewards, Rollout } from './algorithm.js';

/**
 * What becomes of answers that were cut at the most new tokens: learned from as if they had ended (`keep`), left out of
 * losses and statistics (`mask`), or learned from with `truncationPenalty` subtracted from their score (`penalise`).
 * They are counted in `response.truncated` whatever happens.
 */
export interface TruncationSettings {
  readonly truncation: 'keep' | 'mask' | 'penalise';
  readonly truncationPenalty: number;
}

/** Positions that are learned: the sampled ones, without those of truncated answers when the policy masks them. */
export function learnedMask(rollout: Rollout, { truncation }: TruncationSettings): Uint8Array {
  const mask = Uint8Array.from(rollout.responseMask);
  if (truncation !== 'mask') return mask;
  for (const { row, begin, end } of spans(rollout)) if (rollout.finish[row] === 'length') mask.fill(0, begin, end);
  return mask;
}

/**
 * Scores over the packed tokens: per-token rewards where they are, the score of an answer at its last sampled token, and
 * the truncation penalty there too. An answer without a token has nowhere to put its score. Throws `REWARD_ON_GAP` for a
 * reward at a position that the policy did not sample: it would vanish.
 */
export function placeScores(rollout: Rollout, rewards: Rewards, settings: TruncationSettings): Float64Array {
  const placed = rewards.tokens ? Float64Array.from(rewards.tokens) : new Float64Array(rollout.responseMask.length);
  placed.forEach((reward, t) => {
    if (reward === 0 || rollout.responseMask[t]) return;
    throw new LockstepError(
      'REWARD_ON_GAP',
      `A reward of ${reward} lies at packed position ${t}, which predicts no sampled token, so nothing would learn from it. ` +
        "Put rewards on tokens of the response (a step's reward on its last token).",
      { position: t, reward },
    );
  });
  for (const { row, begin, end } of spans(rollout)) {
    const last = rollout.responseMask.subarray(begin, end).lastIndexOf(1);
    if (last < 0) continue;
    if (!rewards.tokens) placed[begin + last]! += rewards.scores[row]!;
    placed[begin + last]! -= penalty(rollout, row, settings);
  }
  return placed;
}

/** What is subtracted from the score of a row. */
export function penalty(
  { finish }: Rollout,
  row: number,
  { truncation, truncationPenalty }: TruncationSettings,
): number {
  return truncation === 'penalise' && finish[row] === 'length' ? truncationPenalty : 0;
}

/** Where each sequence lies in the packed arrays. */
export function spans({ lengths }: Rollout): { row: number; begin: number; end: number }[] {
  let end = 0;
  return Array.from(lengths, (length, row) => {
    end += length;
    return { row, begin: end - length, end };
  });
}
