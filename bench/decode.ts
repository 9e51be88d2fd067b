/** Decoding and prefill of llama-25m after a prompt of 128 tokens, for 1 and 32 sequences. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { NativeEngine } from '../src/engine/native-engine.js';
import { createDevice, randomEngine, randomTokens, round, secondsOf, shapeOf, spread } from './support.js';

const promptLength = 128;
const newTokens = 128;

function generate(engine: NativeEngine, sequences: number, maxNewTokens: number) {
  const requests = Array.from({ length: sequences }, (_, id) => ({
    prompt: randomTokens(promptLength, engine.shape.vocabulary, id + 10),
    id,
  }));
  return engine.generate(requests, { maxNewTokens, temperature: 0, topP: 1, topK: 0, stopTokens: [], seed: 1 });
}

export async function* measure({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  const shape = shapeOf('llama-25m');
  for (const dtype of ['bfloat16', 'float32'] as const) {
    for (const used of threads > 1 ? [1, threads] : [1]) {
      await using device = createDevice({ threads: used });
      await using engine = await randomEngine({ shape, device, dtype });
      for (const sequences of [1, 32]) {
        signal.throwIfAborted();
        note(`decode, ${dtype}, ${used} threads, ${sequences} sequences`);
        const generated = await generate(engine, sequences, 4);
        if (generated.some(({ tokens }) => tokens.length !== 4)) throw new Error('decode: tokens are missing');
        const prefill = await secondsOf(runs, () => generate(engine, sequences, 1));
        const all = await secondsOf(runs, () => generate(engine, sequences, 1 + newTokens));
        const decode = spread(all.map((seconds, i) => (sequences * newTokens) / (seconds - prefill[i]!)));
        const label = `B=${sequences}, ${dtype}, ${used} thread${used === 1 ? '' : 's'}`;
        yield {
          name: `decode ${label}`,
          value: round(decode.median),
          unit: 'tokens/s',
          min: round(decode.min),
          max: round(decode.max),
        };
        const read = spread(prefill.map((seconds) => (sequences * promptLength) / seconds));
        yield {
          name: `prefill ${label}`,
          value: round(read.median),
          unit: 'tokens/s',
          min: round(read.min),
          max: round(read.max),
        };
      }
    }
  }
}
