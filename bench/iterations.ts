/** Iterations of reinforcement learning in bfloat16, over a model of bench/support.ts: what several benches time. */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { parseConfig } from '../src/train/config.js';
import { train } from '../src/train/train.js';
import { measured, randomTokens, shapeOf, subject, writeModel } from './support.js';

export interface Timing {
  seconds: number;
  /** Share of it that no native call runs. */
  outside: number;
  /** Share of it in which no rank computes or transfers. */
  controller: number;
  /** Seconds of each phase. */
  phases: Record<string, number>;
}

/** `runs` iterations after one that is not counted; each is checked: mismatch 0 and responses of full length. */
export async function iterations(
  { runs, threads, signal, note }: BenchOptions,
  settings: Record<string, unknown>,
  { samples = 1 }: { samples?: number } = {},
): Promise<Timing[]> {
  const { model } = subject();
  const { sequences, promptTokens, newTokens, microTokens } = subject().rollout;
  const folder = await mkdtemp(join(tmpdir(), 'lockstep-bench-'));
  try {
    note('writing models');
    await writeModel(model, join(folder, 'policy'), 'language', 1);
    await writeModel(model, join(folder, 'reward'), 'score', 2);
    const prompts = (sequences / samples) * (runs + 1);
    const rows = Array.from({ length: prompts }, (_, i) =>
      JSON.stringify({ tokens: [...randomTokens(promptTokens, Math.min(4096, shapeOf(model).vocabulary), i + 1)] }),
    );
    await writeFile(join(folder, 'prompts.jsonl'), rows.join('\n'));
    await writeFile(join(folder, 'reward.mjs'), rewardSource);
    const config = parseConfig({
      model: join(folder, 'policy'),
      reward: samples > 1 ? { function: join(folder, 'reward.mjs') } : { model: join(folder, 'reward') },
      data: { train: join(folder, 'prompts.jsonl') },
      batch: { sequences, microTokens },
      rollout: { maxNewTokens: newTokens, samples },
      steps: runs + 1,
      threads,
      checkpoint: { every: 0, async: false },
      output: join(folder, 'run'),
      ...settings,
    });
    const rowsOfSteps: Omit<Timing, 'controller'>[] = [];
    for await (const event of train(config, { signal })) {
      if (event.type !== 'step') continue;
      const { metrics } = event;
      if (metrics['mismatch.max'] !== 0 || metrics['response.length'] !== newTokens) {
        throw new Error('the trainer and the rollout disagree, or responses are short');
      }
      const seconds = metrics['seconds.step']!;
      note(`${config.algorithm} iteration ${event.step}: ${seconds.toFixed(2)} s`);
      if (event.step === 1) continue;
      const phases = Object.entries(metrics).filter(([name]) => name.startsWith('seconds.') && name !== 'seconds.step');
      rowsOfSteps.push({
        ...{ seconds, outside: 1 - metrics['seconds.native']! / seconds },
        phases: Object.fromEntries(phases.map(([name, value]) => [name.slice('seconds.'.length), value])),
      });
      // Without the checkpoint that follows the last step.
      if (event.step === config.steps) break;
    }
    const shares = idleShares(JSON.parse(await readFile(join(config.output, 'trace.json'), 'utf8')) as Span[]);
    return rowsOfSteps.map((row, i) => ({ ...row, controller: shares[i + 1]! }));
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/** Of an algorithm's iteration: seconds, and the share of it outside native calls. */
export async function* timedIterations(
  name: string,
  options: BenchOptions,
  settings: Record<string, unknown>,
  samples: number,
): AsyncGenerator<Measurement> {
  const timings = await iterations(options, settings, { samples });
  const seconds = timings.map((timing) => timing.seconds);
  yield measured(`${name} iteration`, seconds, 's');
  for (const phase of Object.keys(timings[0]?.phases ?? {})) {
    const inPhase = timings.map(({ phases }) => phases[phase] ?? 0);
    yield measured(`${name} iteration: ${phase}`, inPhase, 's');
  }
  const outside = timings.map((timing) => timing.outside);
  yield measured(`${name}: outside native calls`, outside, 'share of an iteration');
}

/** A number that costs nothing to compute and differs among the answers to a prompt. */
const rewardSource = 'export default (samples) => samples.map(({ tokens }, i) => (tokens[0] + i) % 7);\n';

interface Span {
  name: string;
  cat: string;
  ph: string;
  ts: number;
  dur: number;
}

/** Of each step the share of its time in which no rank works. */
function idleShares(trace: readonly Span[]): number[] {
  const spans = trace.filter(({ ph }) => ph === 'X');
  const steps = spans.filter(({ name, cat }) => name === 'step' && cat === 'phase').sort((a, b) => a.ts - b.ts);
  const works = spans
    .filter(({ cat }) => cat === 'compute' || cat === 'transfer')
    .map(({ ts, dur }) => [ts, ts + dur] as const)
    .sort((a, b) => a[0] - b[0]);
  return steps.map(({ ts, dur }) => {
    let busy = 0;
    let reached = ts;
    for (const [begin, end] of works) {
      const from = Math.max(begin, reached);
      const to = Math.min(end, ts + dur);
      if (to > from) busy += to - from;
      reached = Math.max(reached, Math.min(end, ts + dur));
    }
    return 1 - busy / dur;
  });
}
