/**
 * Collectives among ranks of one process against memcpy by as many threads. Bus bandwidth as nccl-tests define it: of S bytes
 * (gathered, or scattered, or summed) over n ranks in t seconds, S/t * (n-1)/n for all-gather and reduce-scatter and
 * S/t * 2(n-1)/n for all-reduce, which is what a rank receives per second. Ranks are one thread each and work in place; memcpy is
 * timed in turn, each thread copying one half of a buffer of S bytes to the other, and its bandwidth is one thread's.
 */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { NativeBench } from '../src/engine/native.js';
import { createDevice, measured, shareOfCeiling } from './support.js';

type Collective = Extract<NativeBench, { what: 'collective' }>;

export async function* measure({ runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  await using device = createDevice({ threads: 1 });
  for (const ranks of [2, 4]) {
    for (const operation of ['all-gather', 'reduce-scatter', 'all-reduce'] as const) {
      for (const megabytes of [8, 32, 128]) {
        signal.throwIfAborted();
        const name = `${operation} ${megabytes} MB, ${ranks} ranks`;
        note(name);
        const call: Collective = { what: 'collective', runs, operation, ranks, bytes: megabytes * 1e6 };
        yield { ...(await shareOfCeiling(device, name, call)), unit: 'bus bandwidth over memcpy' };
      }
    }
    signal.throwIfAborted();
    yield await latency({ what: 'collective', runs, operation: 'all-reduce', ranks, bytes: 65536 });
  }

  async function latency(call: Collective): Promise<Measurement> {
    const name = `${call.operation} 64 KiB, ${call.ranks} ranks`;
    note(name);
    const { value } = await device.native.bench(call);
    const { verified, seconds, work } = value;
    if (!verified) throw new Error(`${name}: the sums are wrong; nothing was measured`);
    const calls = work / ((2 * call.bytes * (call.ranks - 1)) / call.ranks);
    const micros = seconds.map((each) => (each / calls) * 1e6);
    return measured(name, micros, 'µs');
  }
}
