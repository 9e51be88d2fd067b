/** One training step of llama-25m on 8 x 256 tokens: forward, backward, clip, AdamW; and what the parts tree costs. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { createDevice, randomEngine, round, shapeOf, spread } from './support.js';
import { stepTokens, trainingStep } from './training-step.js';

export async function* measure({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  const shape = shapeOf('llama-25m');
  for (const dtype of ['bfloat16', 'float32'] as const) {
    note(`training step, ${dtype}`);
    await using device = createDevice({ threads });
    await using split = await randomEngine({ shape, device, dtype, train: true });
    await using whole = await randomEngine({ shape, device, dtype, train: true, parts: 1 });
    const times: [number[], number[]] = [[], []];
    for (let i = 0; i <= Math.max(runs, 5); i++) {
      signal.throwIfAborted();
      for (const [which, engine] of [split, whole].entries()) {
        const seconds = await trainingStep(engine, i + 1);
        if (i > 0) times[which]!.push(seconds);
      }
    }
    const rate = spread(times[0].map((seconds) => stepTokens / seconds));
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
