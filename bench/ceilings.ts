/** What this machine gives at most: multiply-adds, reading memory, moves to the host, and the cost of starting an operation. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { createDevice, measured, subject } from './support.js';

export async function* measure({ threads, runs }: BenchOptions): AsyncGenerator<Measurement> {
  await using device = createDevice({ threads });
  const { ceilingBytes } = subject();
  for (const dtype of ['float32', 'bfloat16'] as const) {
    const { value: result } = await device.native.bench({ what: 'ceilings', runs, dtype, ceilingBytes });
    const flops = result.ceilingSeconds.map((seconds) => (2 * result.ceilingWork) / seconds / 1e9);
    yield measured(`multiply-adds ${dtype}`, flops, 'GF/s');
    if (dtype === 'bfloat16') continue;
    const read = result.seconds.map((seconds) => result.work / seconds / 1e9);
    yield measured('memory read', read, 'GB/s');
  }
  const { value: moves } = await device.native.bench({ what: 'moves', runs, bytes: ceilingBytes / 2 });
  const moved = moves.seconds.map((seconds) => moves.work / seconds / 1e9);
  yield measured('pinned host memory to the device and back', moved, 'GB/s');
  const { value: dispatch } = await device.native.bench({ what: 'dispatch', runs });
  const micros = dispatch.seconds.map((seconds) => seconds * 1e6);
  yield measured(device.kernels === 'cuda' ? 'an operation that is waited for' : 'thread pool dispatch', micros, 'µs');
}
