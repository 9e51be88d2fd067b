/**
 * Speculation: tokens per second with guesses over without, run by run in turn. Texts that repeat themselves (greedy text of random
 * weights ends in a cycle) show what right guesses give, sampled ones (in which nothing repeats) what looking for guesses costs.
 */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { NativeEngine } from '../src/engine/native-engine.js';
import { createDevice, measured, randomEngine, randomTokens, round, shapeOf, subject } from './support.js';

const kinds = [
  { texts: 'repeating', temperature: 0, counts: [1, 3, 7] },
  { texts: 'sampled', temperature: 1, counts: [3] },
] as const;

async function generate(engine: NativeEngine, sequences: number, temperature: number, speculation: number) {
  const { promptTokens, newTokens } = subject();
  const requests = Array.from({ length: sequences }, (_, id) => ({
    prompt: randomTokens(promptTokens, engine.shape.vocabulary, id + 10),
    id,
  }));
  const start = performance.now();
  const generated = await engine.generate(requests, {
    ...{ maxNewTokens: newTokens, temperature, topP: 1, topK: 0, stopTokens: [], seed: 1, speculation },
  });
  const seconds = (performance.now() - start) / 1000;
  return { text: JSON.stringify(generated.map(({ tokens }) => [...tokens])), seconds, ...engine.lastGeneration! };
}

export async function* measure({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  const { model, dtypes } = subject();
  const shape = shapeOf(model);
  for (const dtype of dtypes) {
    await using device = createDevice({ threads });
    await using engine = await randomEngine({ shape, device, dtype });
    for (const { texts, temperature, counts } of kinds) {
      for (const [sequences, speculation] of [1, 2, 4].flatMap((count) =>
        counts.map((most) => [count, most] as const),
      )) {
        signal.throwIfAborted();
        const name = `${texts} texts B=${sequences}, ${dtype}, ${speculation} guesses`;
        note(name);
        const run = (most: number) => generate(engine, sequences, temperature, most);
        const [plain, guessing] = [await run(0), await run(speculation)];
        if (guessing.text !== plain.text) throw new Error('speculation: guesses changed a text');
        const ratios: number[] = [];
        for (let i = 0; i < runs; i++) ratios.push((await run(0)).seconds / (await run(speculation)).seconds);
        const { steps, guessed, accepted } = guessing;
        yield measured(name, ratios, 'times the tokens/s without guesses', {
          ...{ model, stepsWithout: plain.steps, steps, guessed, right: round(accepted / Math.max(1, guessed)) },
        });
      }
    }
  }
}
