/** One training step: forward, backward, clip, AdamW; its share of the multiply-add peak, and what the parts tree costs. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { ceilingOf, createDevice, randomEngine, round, shapeOf, spread, subject } from './support.js';
import { stepMultiplyAdds, stepTokens, trainingStep } from './training-step.js';

export async function* measure({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  const { model, dtypes, sequences, length, stated } = subject();
  const shape = shapeOf(model);
  for (const dtype of dtypes) {
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
    const rate = spread(times[0].map((seconds) => stepTokens() / seconds));
    yield {
      name: `training step ${sequences} x ${length}, ${dtype}`,
      value: round(rate.median),
      unit: 'tokens/s',
      min: round(rate.min),
      max: round(rate.max),
      kernels: device.kernels,
      model,
    };
    const work = stepMultiplyAdds(split);
    const ceiling = await ceilingOf(device, 'products', dtype);
    const utilization = spread(times[0].map((seconds) => work / seconds / ceiling));
    yield {
      ...{ name: `training step ${sequences} x ${length}, ${dtype}`, value: round(utilization.median) },
      ...{ unit: 'share of the multiply-add peak', min: round(utilization.min), max: round(utilization.max) },
      ...{ multiplyAdds: work, ceiling: round(ceiling) },
      ...(stated && dtype === 'bfloat16'
        ? { ofStated: round((2 * work) / spread(times[0]).median / stated.flops) }
        : {}),
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
