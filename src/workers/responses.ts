/** Generated tokens as responses: a stop string ends them early, and they are packed behind their prompts. */
import { packBatch } from '../data/batch.js';
import type { Prompt, Rollout } from '../data/rollout.js';
import type { StopStrings } from '../data/stop-strings.js';
import type { Generated } from '../engine/engine.js';
import { offsets } from './batches.js';

/** A response without what was sampled behind its stop string. */
export function cutAtStop(generated: Generated, stops: StopStrings | undefined, request: number): Generated {
  const cut = stops?.finish(request, generated.tokens);
  if (!cut) return generated;
  return {
    tokens: generated.tokens.subarray(0, cut.tokens),
    logprobs: generated.logprobs.subarray(0, cut.tokens),
    finish: 'stop',
  };
}

/** Packs prompts and responses; the response token at position t has its log-prob and its mask at t - 1. */
export function packRollout(prompts: readonly Prompt[], generated: readonly Generated[]): Rollout {
  const sequences = prompts.map(({ tokens }, i) => {
    const sequence = new Int32Array(tokens.length + generated[i]!.tokens.length);
    sequence.set(tokens);
    sequence.set(generated[i]!.tokens, tokens.length);
    return sequence;
  });
  const batch = packBatch(sequences);
  const starts = offsets(batch.lengths);
  const logprobs = new Float32Array(batch.tokens.length);
  const responseMask = new Uint8Array(batch.tokens.length);
  generated.forEach((result, i) => {
    const at = starts[i]! + prompts[i]!.tokens.length - 1;
    logprobs.set(result.logprobs, at);
    responseMask.fill(1, at, at + result.tokens.length);
  });
  return {
    ...batch,
    prompts,
    promptLengths: Int32Array.from(prompts, ({ tokens }) => tokens.length),
    logprobs,
    responseMask,
    finish: generated.map(({ finish }) => (finish === 'length' ? 'length' : 'stop')),
  };
}
