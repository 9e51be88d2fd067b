/** One training step on packed sequences of one length: forward, backward, clip, AdamW. */
import type { NativeEngine } from '../src/engine/native-engine.js';
import { randomTokens, subject } from './support.js';

export const stepTokens = (): number => subject().sequences * subject().length;

/** Multiply-adds of a step, with those of recomputation left out: three times those of forward. */
export function stepMultiplyAdds({ shape, table }: NativeEngine): number {
  const { sequences, length } = subject();
  const matrices = table.reduce((sum, { kind, elements }) => sum + (kind === 'matrix' ? elements : 0), 0);
  const lookedUp = shape.tied ? 0 : shape.vocabulary * shape.width;
  const attention = shape.layers * shape.heads * shape.headWidth * length * (length + 1);
  return 3 * sequences * (length * (matrices - lookedUp) + attention);
}

/** Seconds of update `step`. */
export async function trainingStep(engine: NativeEngine, step: number): Promise<number> {
  const { sequences, length } = subject();
  const tokens = randomTokens(sequences * length, engine.shape.vocabulary);
  const lengths = new Int32Array(sequences).fill(length);
  const start = performance.now();
  const { logprobs } = await engine.forward({ tokens, lengths }, { outputs: ['logprobs'], keep: true });
  const weight = -1 / (sequences * (length - 1));
  await engine.backward({ logprobs: new Float32Array(tokens.length).fill(weight) });
  await engine.step({ learningRate: 3e-4, betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1, step });
  if (!Number.isFinite(logprobs![0])) throw new Error('training: the log-probabilities are not finite');
  return (performance.now() - start) / 1000;
}
