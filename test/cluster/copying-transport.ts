/** A transport as one between threads would be: arrays are copied into messages and counted. */
import type { RankCall, Transport } from '../../src/cluster/transport.js';

export class CopyingTransport implements Transport {
  bytesCopied = 0;

  async call({ args, answers }: RankCall, run: (args: readonly unknown[]) => Promise<unknown>): Promise<unknown> {
    const answer = await run(this.copy(args) as unknown[]);
    return answers ? this.copy(answer) : undefined;
  }

  /** structuredClone of a view clones its whole buffer: views are cut out first, and their buffers handed over. */
  private copy(value: unknown): unknown {
    const buffers: ArrayBuffer[] = [];
    const pack = (inner: unknown): unknown => {
      if (ArrayBuffer.isView(inner)) {
        const cutOut = (inner as Float32Array<ArrayBuffer>).slice();
        this.bytesCopied += cutOut.byteLength;
        buffers.push(cutOut.buffer);
        return cutOut;
      }
      if (Array.isArray(inner)) return inner.map(pack);
      if (typeof inner !== 'object' || inner === null) return inner;
      return Object.fromEntries(Object.entries(inner).map(([name, field]) => [name, pack(field)]));
    };
    return structuredClone(pack(value), { transfer: buffers });
  }
}
