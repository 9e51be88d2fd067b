/** One training step: forward, backward, clip, AdamW; its share of the multiply-add peak, and what the parts tree costs. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { Device } from '../src/engine/device.js';
import type { NativeEngine } from '../src/engine/native-engine.js';
import { LockstepError } from '../src/errors.js';
import { ceilingOf, createDevice, measured, randomEngine, round, shapeOf, spread, subject } from './support.js';
import { stepMultiplyAdds, stepTokens, trainingStep } from './training-step.js';

type Dtype = 'float32' | 'bfloat16';

export async function* measure(options: BenchOptions): AsyncGenerator<Measurement> {
  const { model, dtypes, sequences, length, stated } = subject();
  for (const dtype of dtypes) {
    options.note(`training step, ${dtype}`);
    await using device = createDevice({ threads: options.threads });
    await using split = await randomEngine({ shape: shapeOf(model), device, dtype, train: true });
    const [times] = await stepTimes([split], options);
    const name = `training step ${sequences} x ${length}, ${dtype}`;
    const rates = times!.map((seconds) => stepTokens() / seconds);
    yield measured(name, rates, 'tokens/s', { kernels: device.kernels, model });
    const work = stepMultiplyAdds(split);
    const ceiling = await ceilingOf(device, 'products', dtype);
    const ofStated = stated && dtype === 'bfloat16' && round((2 * work) / spread(times!).median / stated.flops);
    yield measured(
      `utilization, ${name}`,
      times!.map((seconds) => work / seconds / ceiling),
      'share of the multiply-add peak',
      { multiplyAdds: work, ceiling: round(ceiling), ...(ofStated ? { ofStated } : {}) },
    );
    const tree = await treeCost(split, dtype, device, options);
    if (tree) yield measured(`parts ${split.parts} against 1, ${dtype}`, tree, 'share of a training step');
  }
}

/** Of each engine the seconds of its steps, in turn with those of the others. */
async function stepTimes(engines: readonly NativeEngine[], { runs, signal }: BenchOptions): Promise<number[][]> {
  const times = engines.map((): number[] => []);
  for (let i = 0; i <= Math.max(runs, 5); i++) {
    for (const [which, engine] of engines.entries()) {
      signal.throwIfAborted();
      const seconds = await trainingStep(engine, i + 1);
      if (i > 0) times[which]!.push(seconds);
    }
  }
  return times;
}

/** What parts add to a step, or undefined where the device has no room for a second model beside the first. */
export async function treeCost(
  split: NativeEngine,
  dtype: Dtype,
  device: Device,
  options: BenchOptions,
): Promise<number[] | undefined> {
  try {
    await using whole = await randomEngine({ shape: split.shape, device, dtype, train: true, parts: 1 });
    const [ofSplit, ofWhole] = await stepTimes([split, whole], options);
    return ofSplit!.map((seconds, i) => seconds / ofWhole![i]! - 1);
  } catch (error) {
    if (!LockstepError.isInstance(error) || error.code !== 'MEMORY_BUDGET') throw error;
    options.note(`parts ${split.parts} against 1 are not measured, two models do not fit: ${error.message}`);
    return undefined;
  }
}
