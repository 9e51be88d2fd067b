/** What every algorithm that learns from rollouts does with one: which tokens count, and where scores go. */
import { packBatch, type TokenBatch } from '../data/batch.js';
import { lastSampled } from '../data/rollout.js';
import { LockstepError } from '../errors.js';
import { pretrainingLoss } from '../losses/mixed.js';
import type { Addition, Context, Experience, Rewards, Rollout } from './algorithm.js';

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
  lastSampled(rollout.lengths, rollout.responseMask).forEach((last, row) => {
    if (last < 0) return;
    if (!rewards.tokens) placed[last]! += rewards.scores[row]!;
    placed[last]! -= penalty(rollout, row, settings);
  });
  return placed;
}

/** Per sequence: the score with the truncation penalty. */
export const penalisedScores = (rollout: Rollout, { scores }: Rewards, settings: TruncationSettings): Float64Array =>
  scores.map((score, row) => score - penalty(rollout, row, settings));

/** What is subtracted from the score of a row. */
export function penalty(
  { finish }: Rollout,
  row: number,
  { truncation, truncationPenalty }: TruncationSettings,
): number {
  return truncation === 'penalise' && finish[row] === 'length' ? truncationPenalty : 0;
}

/** Where each sequence lies in the packed arrays. */
export function spans({ lengths }: Pick<TokenBatch, 'lengths'>): { row: number; begin: number; end: number }[] {
  let end = 0;
  return Array.from(lengths, (length, row) => {
    end += length;
    return { row, begin: end - length, end };
  });
}

/** A batch to learn from a rollout: the learned positions, what the loss reads, and what the trainer's log-probs must equal. */
export const sampledExperience = (
  { tokens, lengths, logprobs, responseMask }: Rollout,
  mask: Uint8Array,
  columns: Experience['columns'],
): Experience => ({
  tokens,
  lengths,
  mask,
  columns: { ...columns, oldLogprobs: logprobs, sampledLogprobs: logprobs, sampledMask: responseMask },
});

/** ptx: γ times the cross-entropy of pretraining sequences in the same steps (Ouyang et al. 2022, arXiv:2203.02155, eq. 2). */
export const pretrainingMix = ({ pretraining }: Context, gamma: number): readonly Addition[] =>
  pretraining ? [{ experience: pretraining, loss: pretrainingLoss(gamma) }] : [];

/** Rows of rollouts as one rollout, in the order given. */
export function joinRows(parts: readonly { rollout: Rollout; rows: readonly number[] }[]): Rollout {
  const sources = parts.flatMap(({ rollout, rows }) => {
    const places = spans(rollout);
    return rows.map((row) => ({ rollout, ...places[row]! }));
  });
  const { tokens, lengths } = packBatch(sources.map(({ rollout, begin, end }) => rollout.tokens.subarray(begin, end)));
  const logprobs = new Float32Array(tokens.length);
  const responseMask = new Uint8Array(tokens.length);
  let at = 0;
  for (const { rollout, begin, end } of sources) {
    logprobs.set(rollout.logprobs.subarray(begin, end), at);
    responseMask.set(rollout.responseMask.subarray(begin, end), at);
    at += end - begin;
  }
  const promptLengths = Int32Array.from(sources, ({ rollout, row }) => rollout.promptLengths[row]!);
  const prompts = sources.map(({ rollout, row }) => rollout.prompts[row]!);
  return {
    tokens,
    lengths,
    logprobs,
    responseMask,
    promptLengths,
    prompts,
    finish: sources.map(({ rollout, row }) => rollout.finish[row]!),
  };
}

/** Σ over each sequence of a packed array. */
export const sumsBySequence = (batch: TokenBatch, packed: Float64Array | Uint8Array): Float64Array =>
  Float64Array.from(spans(batch), ({ begin, end }) => {
    let sum = 0;
    for (let t = begin; t < end; t++) sum += packed[t]!;
    return sum;
  });
