/** A worker that knows nothing: it counts its calls and answers with what it received. */
import type { Degrees, GenerationDegrees } from '../../src/layout/parallel.js';

export class CountingWorker<Batch = unknown> {
  readonly calls: Record<string, number> = {};
  readonly received: unknown[] = [];

  constructor(readonly rank: number) {}

  echo(batch: Batch): Batch {
    this.count('echo', batch);
    return batch;
  }

  /** Like a batch of one row: which rank answered. */
  who(batch: unknown): number[] {
    this.count('who', batch);
    return [this.rank];
  }

  scale(batch: Float32Array, options: { factor: number }): Float32Array {
    this.count('scale', options);
    return batch.map((x) => x * options.factor);
  }

  async describe(): Promise<string> {
    this.count('describe', undefined);
    return `rank ${this.rank}`;
  }

  private count(method: string, value: unknown): void {
    this.calls[method] = (this.calls[method] ?? 0) + 1;
    this.received.push(value);
  }
}

export const countingWorkers = <Batch = unknown>(count: number): CountingWorker<Batch>[] =>
  Array.from({ length: count }, (_, rank) => new CountingWorker(rank));

export const degrees = (pipeline: number, tensor: number, data: number): Degrees => ({ pipeline, tensor, data });

/** Every layout of at most `most` ranks with every generation layout that divides it. */
export function layouts(most: number): { layout: Degrees; generation: GenerationDegrees }[] {
  const upTo = (n: number) => Array.from({ length: n }, (_, i) => i + 1);
  const divisors = (n: number) => upTo(n).filter((k) => n % k === 0);
  return upTo(most).flatMap((p) =>
    upTo(Math.floor(most / p)).flatMap((t) =>
      upTo(Math.floor(most / (p * t))).flatMap((d) =>
        divisors(p).flatMap((pipeline) =>
          divisors(t).map((tensor) => ({ layout: degrees(p, t, d), generation: { pipeline, tensor } })),
        ),
      ),
    ),
  );
}
