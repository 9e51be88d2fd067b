/** A checkpoint of llama-25m with its optimizer state: saved at once, and behind the next training step, which pays for it. */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { beginSavingModel } from '../src/checkpoints/hugging-face.js';
import { beginSavingOptimizerState, loadOptimizerState } from '../src/checkpoints/state.js';
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { NativeEngine } from '../src/engine/native-engine.js';
import { configOf, createDevice, measured, randomEngine, round, shapeOf } from './support.js';
import { trainingStep } from './training-step.js';

/** Begins both parts; returns how to wait for them. */
async function begin(engine: NativeEngine, folder: string, copy: boolean): Promise<() => Promise<unknown>> {
  const model = await beginSavingModel(engine, folder, { configJson: configOf('llama-25m'), copy });
  const state = await beginSavingOptimizerState(engine, join(folder, 'trainer'), { copy });
  return () => Promise.all([model.written, state.written]);
}

async function digest(folder: string): Promise<string> {
  const hash = createHash('sha256');
  for (const file of ['model.safetensors', 'trainer/optimizer.safetensors']) {
    await pipeline(createReadStream(join(folder, file)), hash, { end: false });
  }
  return hash.digest('hex');
}

const seconds = async (work: () => Promise<unknown>): Promise<number> => {
  const start = performance.now();
  await work();
  return (performance.now() - start) / 1000;
};

export async function* measure({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  await using device = createDevice({ threads });
  await using engine = await randomEngine({ shape: shapeOf('llama-25m'), device, dtype: 'bfloat16', train: true });
  const folder = await mkdtemp(join(tmpdir(), 'lockstep-bench-'));
  const bytes = 12 * engine.table.flatMap(({ sources }) => sources).reduce((sum, { shape }) => sum + product(shape), 0);
  const times = { whole: [], waited: [], behind: [], load: [], quiet: [], busy: [] } as Record<string, number[]>;
  try {
    for (let i = 0; i <= Math.max(runs, 3); i++) {
      signal.throwIfAborted();
      note(`round ${i}`);
      const step = 2 * i + 1;
      const quiet = await trainingStep(engine, step);
      const whole = await seconds(async () => (await begin(engine, folder, false))());
      const expected = await digest(folder);
      const load = await seconds(() => loadOptimizerState(engine, join(folder, 'trainer')));
      const start = performance.now();
      const written = await begin(engine, folder, true);
      const waited = (performance.now() - start) / 1000;
      const behind = written().then(() => (performance.now() - start) / 1000);
      const busy = await trainingStep(engine, step + 1);
      await behind;
      if ((await digest(folder)) !== expected) throw new Error('checkpoint: the files differ; nothing was measured');
      if (i === 0) continue;
      for (const [name, value] of Object.entries({ whole, waited, behind: await behind, load, quiet, busy })) {
        times[name]!.push(value);
      }
    }
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
  yield measured('save', times.whole!, 's', { megabytes: round(bytes / 1e6) });
  yield measured(
    'save, rate',
    times.whole!.map((each) => bytes / 1e6 / each),
    'MB/s',
  );
  yield measured('save behind a step, until training goes on', times.waited!, 's');
  yield measured('save behind a step, until it is in place', times.behind!, 's');
  yield measured(
    'the step meanwhile, longer than a quiet one by',
    times.busy!.map((each, i) => each - times.quiet![i]!),
    's',
  );
  yield measured('training step', times.quiet!, 's');
  yield measured('load the optimizer state', times.load!, 's');
}

const product = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);
