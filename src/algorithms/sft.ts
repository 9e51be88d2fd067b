/** Supervised fine-tuning: maximum likelihood of the learned tokens (Ouyang et al. 2022, arXiv:2203.02155, section 3.5). */
import { packBatch } from '../data/batch.js';
import { crossEntropy } from '../losses/sft.js';
import { type Algorithm, type Evaluation, type Experience, type Learner, stateless } from './algorithm.js';

/** Token ids, and which of them are targets. Nothing predicts the first one. */
export interface SftExample {
  readonly tokens: Int32Array;
  readonly mask: Uint8Array | readonly number[];
}

export interface SftModels {
  readonly actor: Learner;
}

/** One optimizer step per batch on L = −Σ log π(target) / targets. */
export function sft(): Algorithm<SftModels, Experience> {
  return {
    models: ['actor'],
    async iterate({ actor }, batch, { iteration }) {
      const { loss, gradientNorm } = await actor.update(batch, crossEntropy(), {
        epochs: 1,
        miniBatches: 1,
        iteration,
      });
      return { metrics: { loss, 'gradient.norm': gradientNorm } };
    },
    ...stateless,
  };
}

/** The loss on held-out examples. */
export const evaluateSft = ({ actor }: SftModels, batch: Experience): Promise<Evaluation> =>
  actor.computeLoss(batch, crossEntropy());

/** Packs examples: target i is learned at the position that predicts it, i − 1. */
export function sftBatch(examples: readonly SftExample[]): Experience {
  const { tokens, lengths } = packBatch(examples.map((example) => example.tokens));
  const mask = examples.flatMap((example) =>
    Array.from(example.tokens, (_, t) => (t + 1 < example.tokens.length && example.mask[t + 1] ? 1 : 0)),
  );
  return { tokens, lengths, mask: Uint8Array.from(mask), columns: {} };
}
