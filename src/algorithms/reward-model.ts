/** Reward modelling from preferences (Ouyang et al. 2022, arXiv:2203.02155, eq. 1). */
import { packBatch } from '../data/batch.js';
import { bradleyTerry, type RewardLossSettings } from '../losses/reward-model.js';
import { type Algorithm, type Evaluation, type Experience, type Learner, stateless } from './algorithm.js';
import { pairMetrics } from './metrics.js';

/** Two whole sequences, prompt included; the chosen one is to score higher by at least the margin. */
export interface Pair {
  readonly chosen: Int32Array;
  readonly rejected: Int32Array;
  readonly margin: number;
}

export interface RewardModels {
  readonly reward: Learner;
}

/** One optimizer step per batch on L = −E[ log σ(c − r − margin) ]. */
export function rewardModel(settings: RewardLossSettings = {}): Algorithm<RewardModels, Experience> {
  return {
    models: ['reward'],
    async iterate({ reward }, batch, { iteration }) {
      const update = { epochs: 1, miniBatches: 1, iteration };
      const { loss, gradientNorm, statistics } = await reward.update(batch, bradleyTerry(settings), update);
      return { metrics: { loss, 'gradient.norm': gradientNorm, ...pairMetrics(statistics) } };
    },
    ...stateless,
  };
}

/** Loss, accuracy and margin on held-out pairs. */
export const evaluateRewardModel = (
  { reward }: RewardModels,
  batch: Experience,
  settings: RewardLossSettings = {},
): Promise<Evaluation> => reward.evaluate(batch, bradleyTerry(settings));

/** Packs pairs as rows 2i (chosen) and 2i + 1 (rejected). The score is the value at a sequence's last token. */
export function rewardBatch(pairs: readonly Pair[]): Experience {
  const { tokens, lengths } = packBatch(pairs.flatMap(({ chosen, rejected }) => [chosen, rejected]));
  const mask = new Uint8Array(tokens.length);
  const margins = new Float64Array(tokens.length);
  let end = 0;
  lengths.forEach((length, row) => {
    end += length;
    if (length === 0) return;
    mask[end - 1] = 1;
    if (row % 2 === 0) margins[end - 1] = pairs[row / 2]!.margin;
  });
  return { tokens, lengths, mask, columns: { margins } };
}
