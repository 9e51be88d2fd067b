/** What a policy is asked and what it answers. Per-token arrays follow the engine's convention (`LossBatch`). */
import type { TokenBatch } from './batch.js';

/** A prompt as data gives it. */
export interface Prompt {
  readonly tokens: Int32Array;
  /** The row it came from, for reward functions. */
  readonly row: Readonly<Record<string, unknown>>;
}

/** Prompts with sampled responses, packed. */
export interface Rollout extends TokenBatch {
  /** One per sequence: a prompt with n samples comes n times in a row. */
  readonly prompts: readonly Prompt[];
  /** Tokens of the prompt within each sequence, at least 1. */
  readonly promptLengths: Int32Array;
  /** log p of the sampled tokens under the policy that sampled them; 0 outside responses. */
  readonly logprobs: Float32Array;
  /** 1 at positions that predict a token which the policy sampled. */
  readonly responseMask: Uint8Array;
  /** `length`: the response was cut at the most new tokens. */
  readonly finish: readonly ('stop' | 'length')[];
}

/** Which draw of a run a rollout is: another iteration or round (below 256) has other random numbers. */
export interface GenerationOptions {
  readonly iteration: number;
  readonly round?: number | undefined;
  /** The most probable token each time; reported log-probs are then those of temperature 1. */
  readonly greedy?: boolean | undefined;
}

/**
 * Packed position that predicts each sequence's last sampled token; -1 for a sequence without one.
 *
 * @param sampled over the packed positions: not 0 where the next token was sampled
 */
export function lastSampled(lengths: ArrayLike<number>, sampled: ArrayLike<number>): number[] {
  let end = 0;
  return Array.from(lengths, (length) => {
    const begin = end;
    end += length;
    for (let t = end - 1; t >= begin; t--) if (sampled[t]) return t;
    return -1;
  });
}
