/**
 * Direct preference optimisation and its relatives: learning from pairs of answers without a reward model or a rollout.
 * DPO: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; cDPO (label smoothing): Mitchell 2023; IPO: Azar et al. 2023,
 * arXiv:2310.12036; SimPO: Meng et al. 2024, arXiv:2405.14734; ORPO: Hong et al. 2024, arXiv:2403.07691.
 */
import type { Loss } from '../losses/loss.js';
import {
  type Algorithm,
  type Evaluation,
  type Experience,
  type Learner,
  type ReferenceWorker,
  stateless,
} from './algorithm.js';
import { preferenceMetrics } from './metrics.js';
import { type SftExample, sftBatch } from './sft.js';

/** A prompt with either of two answers, the answers' tokens marked. */
export interface Preference {
  readonly chosen: SftExample;
  readonly rejected: SftExample;
}

export interface PreferenceModels {
  readonly actor: Learner & ReferenceWorker;
  /** Of the losses that compare with where the policy started. */
  readonly reference: ReferenceWorker;
}

export interface PreferenceSettings {
  /** One of `preferenceLosses`. */
  readonly loss: Loss;
}

/** One optimizer step per batch of pairs. */
export function preference({ loss }: PreferenceSettings): Algorithm<PreferenceModels, Experience> {
  return {
    models: comparesWithReference(loss) ? ['actor', 'reference'] : ['actor'],
    async iterate(models, pairs, { iteration }) {
      const batch = await withReference(models, pairs, loss);
      const update = { epochs: 1, miniBatches: 1, iteration };
      const { loss: value, gradientNorm, statistics } = await models.actor.update(batch, loss, update);
      return { metrics: { loss: value, 'gradient.norm': gradientNorm, ...preferenceMetrics(statistics) } };
    },
    ...stateless,
  };
}

/** The loss and its statistics on held-out pairs. */
export const evaluatePreference = async (
  models: PreferenceModels,
  pairs: Experience,
  { loss }: PreferenceSettings,
): Promise<Evaluation> => models.actor.computeLoss(await withReference(models, pairs, loss), loss);

export const comparesWithReference = (loss: Loss): boolean => loss.reads.includes('referenceLogprobs');

/** Adds log q of the answers' tokens, q the policy as it started. */
async function withReference({ reference }: PreferenceModels, batch: Experience, loss: Loss): Promise<Experience> {
  if (!comparesWithReference(loss)) return batch;
  return { ...batch, columns: { ...batch.columns, referenceLogprobs: await reference.computeLogprobs(batch) } };
}

/** Packs pairs as rows 2i (chosen) and 2i + 1 (rejected); learned are the positions that predict the answers' tokens. */
export const preferenceBatch = (pairs: readonly Preference[]): Experience => ({
  ...sftBatch(pairs.flatMap(({ chosen, rejected }) => [chosen, rejected])),
  groupSize: 2,
});
