/** What the examples learn, over as many seeds as there are runs: the least and the median change on held-out prompts. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { type Example, learn, prepare, statedExamples } from './examples.js';
import { measured, round } from './support.js';

export async function* measure({ runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  const examples = await statedExamples();
  const changes = new Map<Example, { before: number; after: number }[]>();
  for (const row of [...examples.values()].flat()) changes.set(row, []);
  for (let seed = 0; seed < runs; seed++) {
    const folder = await mkdtemp(join(tmpdir(), 'lockstep-bench-'));
    try {
      await prepare(folder, seed, signal);
      for (const [config, rows] of examples) {
        signal.throwIfAborted();
        const measures = rows.map(({ measure: name }) => name);
        const found = await learn(folder, config, measures, seed);
        for (const row of rows) changes.get(row)!.push(found[row.measure]!);
        note(`seed ${seed}: ${config} ${JSON.stringify(found)}`);
      }
    } finally {
      await rm(folder, { recursive: true, force: true });
    }
  }
  for (const [{ config, measure: name, margin }, pairs] of changes) {
    const change = pairs.map(({ before, after }) => after - before);
    yield measured(`${config}: ${name}`, change, 'change on held-out prompts', {
      margin,
      before: pairs.map(({ before }) => round(before)),
      after: pairs.map(({ after }) => round(after)),
    });
  }
}
