/**
 * KTO: learning from answers that were judged desirable or not, one at a time. Ethayarajh et al. 2024, arXiv:2402.01306, section 4.
 */
import { type KtoSettings, ktoBaseline, kto as ktoLoss } from '../losses/kto.js';
import { type Algorithm, type Evaluation, type Experience, stateless } from './algorithm.js';
import { judgedMetrics } from './metrics.js';
import type { PreferenceModels } from './preference.js';
import { sumsBySequence } from './rollout.js';
import { type SftExample, sftBatch } from './sft.js';

/** A prompt and its answer, the answer's tokens marked. */
export interface JudgedAnswer extends SftExample {
  readonly desirable: boolean;
}

/** Answers, and each prompt with an answer to another, no longer than the longest row. */
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

/** Packs answers, and beside them each prompt with the answer to the next one. */
export function judgedBatch(answers: readonly JudgedAnswer[]): JudgedBatch {
  const desirable = answers.flatMap(({ tokens, desirable }) => Array<number>(tokens.length).fill(desirable ? 1 : 0));
  const longest = Math.max(...answers.map(({ tokens }) => tokens.length));
  const prompts = answers.map(({ tokens, mask }) => tokens.subarray(0, mask.indexOf(1)));
  const texts = prompts.map((prompt) => prompt.join());
  const mismatched = prompts.map((prompt, row) => {
    const next = answers[nextOther(texts, row)]!;
    const begin = next.mask.indexOf(1);
    return {
      tokens: Int32Array.from([...prompt, ...next.tokens.subarray(begin)].slice(0, longest)),
      mask: [...prompt.map(() => 0), ...next.mask.slice(begin)],
    };
  });
  return { answers: { ...sftBatch(answers), columns: { desirable } }, mismatched: sftBatch(mismatched) };
}

/** The next row with another text, around the batch; the next one where all are equal. */
function nextOther(texts: readonly string[], row: number): number {
  const following = [...texts.keys()].map((k) => (row + 1 + k) % texts.length);
  return following.find((other) => texts[other] !== texts[row]) ?? following[0]!;
}
