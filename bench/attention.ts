/** Attention over packed sequences, forward and backward, as a share of the multiply-add peak. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { defaultParts } from '../src/layout/parts.js';
import { createDevice, shapeOf, shareOfCeiling, subject } from './support.js';

export async function* measure({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  await using device = createDevice({ threads });
  const { model, dtypes, sequences, length } = subject();
  const shape = shapeOf(model);
  const { heads, keyValueHeads, headWidth } = shape;
  const parts = defaultParts(shape);
  for (const dtype of dtypes) {
    for (const backward of [false, true]) {
      signal.throwIfAborted();
      const label = `${model} attention ${dtype} ${backward ? 'backward' : 'forward'} ${sequences} x ${length}`;
      note(label);
      const call = { what: 'attention', runs, dtype, backward, sequences, length } as const;
      yield await shareOfCeiling(device, label, { ...call, heads, keyValueHeads, headWidth, parts });
    }
  }
}
