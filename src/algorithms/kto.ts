/**
 * KTO: learning from answers that were judged desirable or not, one at a time. Ethayarajh et al. 2024, arXiv:2402.01306, section 4.
 */
import { type KtoSettings, ktoBaseline, kto as ktoLoss } from '../losses/kto.js';
import { type Algorithm, type Evaluation, type Experience, stateless } from './algorithm.js';
import { judgedMetrics } from './metrics.js';
import { type Answer, answerBatch, type PreferenceModels } from './preference.js';
import { sumsBySequence } from './rollout.js';

export interface JudgedAnswer extends Answer {
  readonly desirable: boolean;
}

/** Answers, and each prompt with the answer of the next one. */
export interface JudgedBatch {
  readonly answers: Experience;
  readonly mismatched: Experience;
}

/** One optimizer step per batch of judged answers. */
export function kto(settings: KtoSettings): Algorithm<PreferenceModels, JudgedBatch> {
  return {
    models: ['actor', 'reference'],
    async iterate(models, batch, { iteration }) {
      const experience = await withReference(models, batch);
      const update = { epochs: 1, miniBatches: 1, iteration };
      const { loss, gradientNorm, statistics } = await models.actor.update(experience, ktoLoss(settings), update);
      return { metrics: { loss, 'gradient.norm': gradientNorm, ...judgedMetrics(statistics) } };
    },
    ...stateless,
  };
}

/** The loss and its statistics on held-out answers. */
export const evaluateKto = async (
  models: PreferenceModels,
  batch: JudgedBatch,
  settings: KtoSettings,
): Promise<Evaluation> => models.actor.computeLoss(await withReference(models, batch), ktoLoss(settings));

/** Adds log q of the answers and z = max(0, mean of Σ log π − log q over mismatched answers), a constant of the batch. */
async function withReference({ actor, reference }: PreferenceModels, { answers, mismatched }: JudgedBatch) {
  const [referenceLogprobs, ofPolicy, ofReference] = await Promise.all([
    reference.computeLogprobs(answers),
    actor.computeLogprobs(mismatched),
    reference.computeLogprobs(mismatched),
  ]);
  const sums = (logprobs: Float32Array) =>
    sumsBySequence(
      mismatched,
      Float64Array.from(logprobs, (logprob, t) => (mismatched.mask[t] ? logprob : 0)),
    );
  const z = ktoBaseline(sums(ofPolicy), sums(ofReference));
  const klBaseline = new Float64Array(answers.tokens.length).fill(z);
  return { ...answers, columns: { ...answers.columns, referenceLogprobs, klBaseline } };
}

export function judgedBatch(answers: readonly JudgedAnswer[]): JudgedBatch {
  const batch = answerBatch(answers);
  const desirable = answers.flatMap(({ tokens, desirable }) => Array<number>(tokens.length).fill(desirable ? 1 : 0));
  const mismatched = answers.map(({ tokens, promptLength }, i) => {
    const next = answers[(i + 1) % answers.length]!;
    const answer = next.tokens.subarray(next.promptLength);
    const both = new Int32Array(promptLength + answer.length);
    both.set(tokens.subarray(0, promptLength));
    both.set(answer, promptLength);
    return { tokens: both, promptLength };
  });
  return { answers: { ...batch, columns: { desirable } }, mismatched: answerBatch(mismatched) };
}
