/** AdamW with clipping and publishing: its time over the time that its bytes take at the memory bandwidth of the same call. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { createDevice, round, shareOfCeiling, subject } from './support.js';

export async function* measure({ threads, runs }: BenchOptions): AsyncGenerator<Measurement> {
  await using device = createDevice({ threads });
  const { updated: count } = subject();
  const share = await shareOfCeiling(device, 'adamw', { what: 'adamw', runs, count });
  yield {
    ...share,
    name: `adamw + clip + publish, ${(count / 1e6).toFixed(1)} M parameters`,
    value: round(1 / share.value),
    min: round(1 / (share.max as number)),
    max: round(1 / (share.min as number)),
    unit: 'times the bytes at bandwidth',
  };
}
