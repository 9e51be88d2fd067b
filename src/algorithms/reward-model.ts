/**
 * Reward modelling from preferences: Ouyang et al. 2022, arXiv:2203.02155, eq. 1. Cost modelling from preferences and safety labels:
 * Dai et al. 2023, arXiv:2310.12773, eq. 6. Both learn a score of whole answers; a higher cost is less safe.
 */
import { packBatch } from '../data/batch.js';
import type { Loss } from '../losses/loss.js';
import { bradleyTerry, costModel as costModelLoss, type RewardLossSettings } from '../losses/reward-model.js';
import { type Algorithm, type Evaluation, type Experience, type Learner, stateless } from './algorithm.js';
import { pairMetrics } from './metrics.js';

/** Two whole sequences, prompt included; the chosen one is to score higher by at least the margin. */
export interface Pair {
  readonly chosen: Int32Array;
  readonly rejected: Int32Array;
  readonly margin: number;
}

/** Two whole sequences, the chosen one the safer; `unsafe` says of each whether it is unsafe. */
export interface SafetyPair extends Pair {
  readonly unsafe: readonly [chosen: boolean, rejected: boolean];
}

export interface RewardModels {
  readonly reward: Learner;
}

/** An algorithm over pairs with its loss, which evaluations read. */
export interface ScoreAlgorithm extends Algorithm<RewardModels, Experience> {
  evaluate(models: RewardModels, batch: Experience): Promise<Evaluation>;
}

/** One optimizer step per batch on L = −E[ log σ(c − r − margin) ]. */
export const rewardModel = (settings: RewardLossSettings = {}): ScoreAlgorithm => learnPairs(bradleyTerry(settings));

/** One optimizer step per batch on L = −E[ log σ(c_r − c_c) + log σ(z_r c_r) + log σ(z_c c_c) ], z = 1 for unsafe, −1 for safe. */
export const costModel = (): ScoreAlgorithm => learnPairs(costModelLoss());

const learnPairs = (loss: Loss): ScoreAlgorithm => ({
  models: ['reward'],
  async iterate({ reward }, batch, { iteration }) {
    const update = { epochs: 1, miniBatches: 1, iteration };
    const { loss: value, gradientNorm, statistics } = await reward.update(batch, loss, update);
    return { metrics: { loss: value, 'gradient.norm': gradientNorm, ...pairMetrics(statistics) } };
  },
  evaluate: ({ reward }, batch) => reward.computeLoss(batch, loss),
  ...stateless,
});

/** Packs pairs as rows 2i (chosen) and 2i + 1 (rejected). The score is the value at a sequence's last token. */
export function rewardBatch(pairs: readonly Pair[]): Experience {
  const { ends, ...batch } = scoredSequences(pairs);
  const margins = new Float64Array(batch.tokens.length);
  pairs.forEach(({ margin }, i) => {
    margins[ends[2 * i]!] = margin;
  });
  return { ...batch, columns: { margins } };
}

/** The same with the column `unsafe`: 1 or −1 at the last token of each answer. */
export function costBatch(pairs: readonly SafetyPair[]): Experience {
  const { ends, ...batch } = scoredSequences(pairs);
  const unsafe = new Float64Array(batch.tokens.length);
  pairs.forEach((pair, i) => {
    pair.unsafe.forEach((value, side) => {
      unsafe[ends[2 * i + side]!] = value ? 1 : -1;
    });
  });
  return { ...batch, columns: { unsafe } };
}

function scoredSequences(pairs: readonly Pair[]) {
  const { tokens, lengths } = packBatch(pairs.flatMap(({ chosen, rejected }) => [chosen, rejected]));
  const mask = new Uint8Array(tokens.length);
  let end = 0;
  const ends = Array.from(lengths, (length) => {
    end += length;
    mask[end - 1] = 1;
    return end - 1;
  });
  return { tokens, lengths, mask, ends, groupSize: 2 };
}
