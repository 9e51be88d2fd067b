/** One micro-batch after the other: what an engine does that has one under way at a time. */
import type { TokenBatch } from '../data/batch.js';
import type { AccumulateOptions, Engine, ForwardResult, TokenGradients } from './engine.js';

export async function accumulateInTurn(
  engine: Pick<Engine, 'forward' | 'backward'>,
  microBatches: readonly TokenBatch[],
  { outputs: wanted, temperature }: AccumulateOptions,
  gradientsOf: (outputs: ForwardResult, index: number) => TokenGradients,
): Promise<void> {
  for (const [index, batch] of microBatches.entries()) {
    const options = { outputs: wanted, ...(temperature === undefined ? {} : { temperature }), keep: true };
    const outputs = await engine.forward(batch, options);
    await engine.backward(gradientsOf(outputs, index));
  }
}
