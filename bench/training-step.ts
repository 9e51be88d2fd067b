/** One training step on 8 x 256 tokens: forward, backward, clip, AdamW. */
import type { NativeEngine } from '../src/engine/native-engine.js';
import { randomTokens } from './support.js';

const sequences = 8;
const length = 256;
export const stepTokens = sequences * length;

/** Seconds of update `step`. */
export async function trainingStep(engine: NativeEngine, step: number): Promise<number> {
  const tokens = randomTokens(stepTokens, engine.shape.vocabulary);
  const lengths = new Int32Array(sequences).fill(length);
  const start = performance.now();
  const { logprobs } = await engine.forward({ tokens, lengths }, { outputs: ['logprobs'], keep: true });
  const weight = -1 / (sequences * (length - 1));
  await engine.backward({ logprobs: new Float32Array(tokens.length).fill(weight) });
  await engine.step({ learningRate: 3e-4, betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1, step });
  if (!Number.isFinite(logprobs![0])) throw new Error('training: the log-probabilities are not finite');
  return (performance.now() - start) / 1000;
}
