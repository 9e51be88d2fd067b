/** Shapes in which workers receive and return data; per-token arrays follow the engine's convention (engine.ts). */
import type { TokenBatch } from '../data/batch.js';
import { microBatches } from '../data/batch.js';
import type { Engine, ForwardOutput } from '../engine/engine.js';

export interface ForwardSettings {
  /** Most tokens of a forward pass. */
  microTokens: number;
  /** Of the log-probs; default 1. */
  temperature?: number;
}

/** Where each sequence starts in the packed arrays, and the packed length. */
export function offsets(lengths: ArrayLike<number>): Int32Array {
  const starts = new Int32Array(lengths.length + 1);
  for (let row = 0; row < lengths.length; row++) starts[row + 1] = starts[row]! + lengths[row]!;
  return starts;
}

/** One output of the model for every token of a batch, in micro-batches, without keeping activations. */
export async function forwardAll(
  engine: Engine,
  { tokens, lengths }: TokenBatch,
  output: Extract<ForwardOutput, 'logprobs' | 'values'>,
  { microTokens, temperature = 1 }: ForwardSettings,
): Promise<Float32Array> {
  const starts = offsets(lengths);
  const packed = new Float32Array(tokens.length);
  const spans = microBatches(lengths, microTokens);
  const parts = spans.map(({ begin, end }) => ({
    tokens: tokens.subarray(starts[begin]!, starts[end]!),
    lengths: lengths.subarray(begin, end),
  }));
  const results = await engine.forwardEach(parts, { outputs: [output], temperature });
  for (const [i, result] of results.entries()) packed.set(result[output]!, starts[spans[i]!.begin]!);
  return packed;
}
