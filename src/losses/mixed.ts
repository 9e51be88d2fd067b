/**
 * Losses mixed by weight into one step: PPO with a pretraining loss (ptx) is one gradient, that of L_PPO on the rollout plus
 * that of γ·CE on pretraining text. Each is normalised by the totals of its own batch.
 * Ouyang et al. 2022, InstructGPT, arXiv:2203.02155, eq. 2.
 */
import { type Aggregation, tokenMean } from './aggregation.js';
import type { Loss } from './loss.js';
import { crossEntropy } from './sft.js';

/** weight · L, with the statistics of L as they are. */
export const weighted = <Column extends string>(loss: Loss<Column>, weight: number): Loss<Column> => ({
  ...loss,
  formula: (t) => loss.formula(t).times(weight),
});

/**
 * γ · CE over pretraining text: with the default token mean, CE is the average negative log-likelihood of that text's own
 * learned tokens. Statistics: `pretrainingLoss`, CE without γ.
 */
export function pretrainingLoss(gamma: number, aggregation: Aggregation = tokenMean): Loss<'logprobs'> {
  const loss = crossEntropy(aggregation);
  return weighted({ ...loss, statistics: (t) => ({ pretrainingLoss: loss.formula(t) }) }, gamma);
}
