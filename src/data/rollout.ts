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
