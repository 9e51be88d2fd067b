/** Decoding and prefill after a prompt: tokens per second, and what decoding reads as a share of memory bandwidth. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { NativeEngine } from '../src/engine/native-engine.js';
import { bytesOf } from '../src/layout/memory-plan.js';
import {
  ceilingOf,
  createDevice,
  measured,
  randomEngine,
  randomTokens,
  round,
  secondsOf,
  shapeOf,
  spread,
  subject,
} from './support.js';

function generate(engine: NativeEngine, sequences: number, maxNewTokens: number) {
  const requests = Array.from({ length: sequences }, (_, id) => ({
    prompt: randomTokens(subject().promptTokens, engine.shape.vocabulary, id + 10),
    id,
  }));
  return engine.generate(requests, { maxNewTokens, temperature: 0, topP: 1, topK: 0, stopTokens: [], seed: 1 });
}

/** Bytes that a decode step must read: each matrix once, and keys and values of the context halfway. */
function stepBytes({ shape, table, dtype }: NativeEngine, sequences: number): number {
  const { promptTokens, newTokens } = subject();
  const matrices = table.reduce((sum, { kind, elements }) => sum + (kind === 'matrix' ? elements : 0), 0);
  const lookedUp = shape.tied ? 0 : shape.vocabulary * shape.width;
  const perPosition = 2 * shape.layers * shape.keyValueHeads * shape.headWidth;
  return bytesOf(dtype) * (matrices - lookedUp + sequences * (promptTokens + newTokens / 2) * perPosition);
}

export async function* measure({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  const { model, dtypes, batches, promptTokens, newTokens, stated } = subject();
  const shape = shapeOf(model);
  for (const dtype of dtypes) {
    await using probe = createDevice({ threads });
    for (const used of threads > 1 && probe.kernels !== 'cuda' ? [1, threads] : [threads]) {
      await using device = createDevice({ threads: used });
      await using engine = await randomEngine({ shape, device, dtype });
      for (const sequences of batches) {
        signal.throwIfAborted();
        note(`decode, ${dtype}, ${used} threads, ${sequences} sequences`);
        const generated = await generate(engine, sequences, 4);
        if (generated.some(({ tokens }) => tokens.length !== 4)) throw new Error('decode: tokens are missing');
        const ceiling = await ceilingOf(device, 'memory', dtype);
        const prefill = await secondsOf(runs, () => generate(engine, sequences, 1));
        const all = await secondsOf(runs, () => generate(engine, sequences, 1 + newTokens));
        const steps = all.map((seconds, i) => newTokens / (seconds - prefill[i]!));
        const label = `B=${sequences}, ${dtype}, ${used} thread${used === 1 ? '' : 's'}`;
        const line = (name: string, values: number[], unit: string, more = {}): Measurement =>
          measured(`${name} ${label}`, values, unit, { model, ...more });
        const rates = steps.map((perSecond) => perSecond * sequences);
        yield line('decode', rates, 'tokens/s');
        const bytes = stepBytes(engine, sequences);
        const read = steps.map((perSecond) => (perSecond * bytes) / ceiling);
        yield line('decode reads', read, 'share of memory bandwidth', {
          stepBytes: bytes,
          ceiling: round(ceiling),
          ...(stated ? { ofStated: round((spread(steps).median * bytes) / stated.bytes) } : {}),
        });
        const prompts = prefill.map((seconds) => (sequences * promptTokens) / seconds);
        yield line('prefill', prompts, 'tokens/s');
      }
    }
  }
}
