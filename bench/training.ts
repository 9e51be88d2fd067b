/** One training step of llama-25m on 8 x 256 tokens: forward, backward, clip, AdamW; and what the parts tree costs. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { NativeEngine } from '../src/engine/native-engine.js';
import { createDevice, randomEngine, randomTokens, round, shapeOf, spread } from './support.js';

const sequences = 8;
const length = 256;

async function trainingStep(engine: NativeEngine, tokens: Int32Array, step: number): Promise<number> {
  const lengths = new Int32Array(sequences).fill(length);
  const start = performance.now();
  const { logprobs } = await engine.forward({ tokens, lengths }, { outputs: ['logprobs'], keep: true });
  const weight = -1 / (sequences * (length - 1));
  await engine.backward({ logprobs: new Float32Array(tokens.length).fill(weight) });
  await engine.step({ learningRate: 3e-4, betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1, step });
  if (!Number.isFinite(logprobs![0])) throw new Error('training: the log-probabilities are not finite');
  return (performance.now() - start) / 1000;
}

export async function* measure({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  const shape = shapeOf('llama-25m');
  const tokens = randomTokens(sequences * length, shape.vocabulary);
  for (const dtype of ['bfloat16', 'float32'] as const) {
    note(`training step, ${dtype}`);
    await using device = createDevice({ threads });
    await using split = await randomEngine({ shape, device, dtype, train: true });
    await using whole = await randomEngine({ shape, device, dtype, train: true, parts: 1 });
    const times: [number[], number[]] = [[], []];
    for (let i = 0; i <= Math.max(runs, 5); i++) {
      signal.throwIfAborted();
      for (const [which, engine] of [split, whole].entries()) {
        const seconds = await trainingStep(engine, tokens, i + 1);
        if (i > 0) times[which]!.push(seconds);
      }
    }
    const rate = spread(times[0].map((seconds) => tokens.length / seconds));
    yield {
      name: `training step 8 x 256, ${dtype}`,
      value: round(rate.median),
      unit: 'tokens/s',
      min: round(rate.min),
      max: round(rate.max),
      kernels: device.kernels,
    };
    const tree = spread(times[0].map((seconds, i) => seconds / times[1][i]! - 1));
    yield {
      name: `parts ${split.parts} against 1, ${dtype}`,
      value: round(tree.median),
      unit: 'share of a training step',
      min: round(tree.min),
      max: round(tree.max),
    };
  }
}
