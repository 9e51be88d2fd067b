/** What this machine gives at most: multiply-adds, reading memory, and the cost of starting the threads. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { createDevice, round, spread } from './support.js';

export async function* measure({ threads, runs }: BenchOptions): AsyncGenerator<Measurement> {
  await using device = createDevice({ threads });
  for (const dtype of ['float32', 'bfloat16'] as const) {
    const { value: result } = await device.native.bench({ what: 'ceilings', runs, dtype });
    const flops = spread(result.ceilingSeconds.map((seconds) => (2 * result.ceilingWork) / seconds / 1e9));
    yield {
      name: `multiply-adds ${dtype}`,
      value: round(flops.median),
      unit: 'GF/s',
      min: round(flops.min),
      max: round(flops.max),
    };
    if (dtype === 'bfloat16') continue;
    const bytes = spread(result.seconds.map((seconds) => result.work / seconds / 1e9));
    yield {
      name: 'memory read',
      value: round(bytes.median),
      unit: 'GB/s',
      min: round(bytes.min),
      max: round(bytes.max),
    };
  }
  const { value: dispatch } = await device.native.bench({ what: 'dispatch', runs });
  const micros = spread(dispatch.seconds.map((seconds) => seconds * 1e6));
  yield {
    name: 'thread pool dispatch',
    value: round(micros.median),
    unit: 'µs',
    min: round(micros.min),
    max: round(micros.max),
  };
}
