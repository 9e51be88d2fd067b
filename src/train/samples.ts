/** Rollouts as texts to keep and to score. */
import { countUnknown, generatedText } from '../data/generated-text.js';
import type { Prompt, Rollout } from '../data/rollout.js';
import type { Tokenizer } from '../data/tokenizer.js';
import { offsets } from '../workers/batches.js';
import type { Sample } from './events.js';
import type { Workshop } from './task.js';

export interface Texts {
  prompt: string;
  response: string;
  /** Of the response. */
  tokens: Int32Array;
}

/** Prompt and response of every sequence; texts are empty without a tokenizer. */
export function textsOf(rollout: Rollout, tokenizer: Tokenizer | undefined): Texts[] {
  const starts = offsets(rollout.lengths);
  const text = (tokens: Int32Array) => (tokenizer ? generatedText(tokenizer, tokens, { skipSpecialTokens: true }) : '');
  return Array.from(rollout.lengths, (length, row) => {
    const sequence = rollout.tokens.subarray(starts[row]!, starts[row]! + length);
    const tokens = sequence.slice(rollout.promptLengths[row]!);
    return { prompt: text(sequence.subarray(0, rollout.promptLengths[row]!)), response: text(tokens), tokens };
  });
}

/** The first `count` sequences as a run folder keeps them: texts, or token ids without a tokenizer. */
export function samplesOf(
  rollout: Rollout,
  tokenizer: Tokenizer | undefined,
  { scores, count = rollout.lengths.length }: { scores?: ArrayLike<number>; count?: number } = {},
): Sample[] {
  return textsOf(rollout, tokenizer)
    .slice(0, count)
    .map(({ prompt, response, tokens }, index) => ({
      index,
      ...(tokenizer
        ? { prompt, response }
        : { promptTokens: Array.from(rollout.prompts[index]!.tokens), responseTokens: Array.from(tokens) }),
      ...(scores ? { reward: scores[index]! } : {}),
      finish: rollout.finish[index]!,
    }));
}

/** What the policy answers to the first prompts that leave room for it: the texts that an evaluation keeps. */
export async function evaluationSamples(
  actor: { generateForEvaluation(prompts: readonly Prompt[]): PromiseLike<Rollout> },
  prompts: readonly Int32Array[],
  { config, roles: [policy], tokenizer }: Pick<Workshop, 'config' | 'roles' | 'tokenizer'>,
): Promise<Sample[]> {
  const asked = prompts
    .filter(({ length }) => length > 0 && length < policy!.shape.maxPositions)
    .slice(0, config.evaluation.samples);
  if (asked.length === 0) return [];
  return samplesOf(await actor.generateForEvaluation(asked.map((tokens) => ({ tokens, row: {} }))), tokenizer);
}

/** `response.unknown`, the number of sampled tokens that the tokenizer lacks; no metric when there are none. */
export function unknownMetric(rollout: Rollout, tokenizer: Tokenizer | undefined): Record<string, number> {
  const count = tokenizer ? countUnknown(tokenizer, sampledTokens(rollout)) : 0;
  return count > 0 ? { 'response.unknown': count } : {};
}

function* sampledTokens({ tokens, responseMask }: Rollout): Generator<number> {
  for (const [t, sampled] of responseMask.entries()) if (sampled) yield tokens[t + 1]!;
}
