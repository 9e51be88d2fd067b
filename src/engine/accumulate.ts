/** One micro-batch after the other: what an engine does that has one under way at a time. */
import type { TokenBatch } from '../data/batch.js';
import type { Engine, ForwardOptions, ForwardResult, TokenGradients } from './engine.js';

export async function accumulateInTurn(
  engine: Pick<Engine, 'forward' | 'backward'>,
  microBatches: readonly TokenBatch[],
  options: Omit<ForwardOptions, 'keep'>,
  gradientsOf: (outputs: ForwardResult, index: number) => TokenGradients,
): Promise<void> {
  for (const [index, batch] of microBatches.entries()) {
    const outputs = await engine.forward(batch, { ...options, keep: true });
    await engine.backward(gradientsOf(outputs, index));
  }
}
