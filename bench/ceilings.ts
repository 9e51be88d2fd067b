/** What this machine gives at most: multiply-adds, reading memory, moves to the host, and the cost of starting an operation. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { createDevice, round, spread, subject } from './support.js';

export async function* measure({ threads, runs }: BenchOptions): AsyncGenerator<Measurement> {
  await using device = createDevice({ threads });
  const { ceilingBytes } = subject();
  for (const dtype of ['float32', 'bfloat16'] as const) {
    const { value: result } = await device.native.bench({ what: 'ceilings', runs, dtype, ceilingBytes });
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
  const { value: moves } = await device.native.bench({ what: 'moves', runs, bytes: ceilingBytes / 2 });
  const moved = spread(moves.seconds.map((seconds) => moves.work / seconds / 1e9));
  yield {
    name: 'pinned host memory to the device and back',
    value: round(moved.median),
    unit: 'GB/s',
    min: round(moved.min),
    max: round(moved.max),
  };
  const { value: dispatch } = await device.native.bench({ what: 'dispatch', runs });
  const micros = spread(dispatch.seconds.map((seconds) => seconds * 1e6));
  yield {
    name: device.kernels === 'cuda' ? 'an operation that is waited for' : 'thread pool dispatch',
    value: round(micros.median),
    unit: 'µs',
    min: round(micros.min),
    max: round(micros.max),
  };
}
