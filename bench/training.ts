/** One training step: forward, backward, clip, AdamW; its share of the multiply-add peak, and what the parts tree costs. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { ceilingOf, createDevice, measured, randomEngine, round, shapeOf, spread, subject } from './support.js';
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
    const name = `training step ${sequences} x ${length}, ${dtype}`;
    const rates = times[0].map((seconds) => stepTokens() / seconds);
    yield measured(name, rates, 'tokens/s', { kernels: device.kernels, model });
    const work = stepMultiplyAdds(split);
    const ceiling = await ceilingOf(device, 'products', dtype);
    const ofStated = stated && dtype === 'bfloat16' && round((2 * work) / spread(times[0]).median / stated.flops);
    yield measured(
      `utilization, ${name}`,
      times[0].map((seconds) => work / seconds / ceiling),
      'share of the multiply-add peak',
      { multiplyAdds: work, ceiling: round(ceiling), ...(ofStated ? { ofStated } : {}) },
    );
    const tree = times[0].map((seconds, i) => seconds / times[1][i]! - 1);
    yield measured(`parts ${split.parts} against 1, ${dtype}`, tree, 'share of a training step');
  }
}
