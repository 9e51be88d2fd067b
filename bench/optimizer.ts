/** AdamW with clipping and publishing: its time over the time that its bytes take at the memory bandwidth of the same call. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { createDevice, round, shareOfCeiling } from './support.js';

export async function* measure({ threads, runs }: BenchOptions): AsyncGenerator<Measurement> {
  await using device = createDevice({ threads });
  const count = 27_787_264;
  const share = await shareOfCeiling(device, 'adamw', { what: 'adamw', runs, count });
  yield {
    ...share,
    name: 'adamw + clip + publish, 27.8 M parameters',
    value: round(1 / share.value),
    min: round(1 / (share.max as number)),
    max: round(1 / (share.min as number)),
    unit: 'times the bytes at bandwidth',
  };
}
