/** The loop: steps, and around them evaluations, rows, texts and checkpoints. It knows no algorithm. */
import type { Config } from './config.js';
import type { MetricsRow, TrainEvent } from './events.js';
import type { Recorder } from './recorder.js';
import type { RunFolder } from './run-folder.js';
import { Saver } from './saver.js';
import { learningRateAt } from './schedule.js';
import type { Outcome, Task } from './task.js';

export interface Run {
  config: Config;
  folder: RunFolder;
  recorder: Recorder;
  task: Task;
  signal: AbortSignal | undefined;
  /** Makes the task's steps and evaluations end at once. */
  cancel: AbortSignal | undefined;
  /** `performance.now()` when the run began. */
  started: number;
}

export interface RunWarning {
  code: string;
  message: string;
}

/** Runs the steps after `done`; the last one is always saved, also when the signal ends the run early, but not when it is cancelled. */
export async function* loop(run: Run, done: number): AsyncGenerator<TrainEvent> {
  const { config, folder, signal } = run;
  const saver = new Saver(run);
  let step = done;
  try {
    if (step === 0 && step < config.steps && !signal?.aborted) yield* evaluateBefore(run);
    while (step < config.steps && !signal?.aborted) {
      yield* oneStep(run, step + 1);
      step++;
      yield* some(await saver.ended());
      const due = config.checkpoint.every > 0 && step % config.checkpoint.every === 0;
      if (!due && step < config.steps && !signal?.aborted) continue;
      yield* some(await saver.wait());
      await saver.begin(step);
      if (!config.checkpoint.async) yield* some(await saver.wait());
    }
    yield* some(await saver.wait());
  } catch (error) {
    if (!cameOf(error, run.cancel)) throw error;
    yield* some(await saver.wait().catch(() => undefined));
  } finally {
    // A step that fails leaves the checkpoint before it complete; its own error is the run's.
    await saver.wait().catch(() => undefined);
  }
  const output = folder.path;
  const checkpoint = (await folder.checkpoints()).at(-1)?.directory;
  if (step >= config.steps) {
    yield { type: 'done', step, checkpoint: checkpoint!, output, seconds: (performance.now() - run.started) / 1000 };
  } else {
    yield interrupted(step, checkpoint, output);
  }
}

export function interrupted(step: number, checkpoint: string | undefined, output: string): TrainEvent {
  return { type: 'interrupted', step, ...(checkpoint === undefined ? {} : { checkpoint }), output };
}

/** Whether an error, or a cause of it, is the reason of a signal that fired. */
export function cameOf(error: unknown, signal: AbortSignal | undefined): boolean {
  if (!signal?.aborted) return false;
  for (let at = error; at !== undefined; at = at instanceof Error ? at.cause : undefined) {
    if (at === signal.reason) return true;
  }
  return false;
}

const some = <T>(value: T | undefined): T[] => (value === undefined ? [] : [value]);

async function* oneStep(run: Run, step: number): AsyncGenerator<TrainEvent> {
  const { config, folder, recorder, task } = run;
  recorder.step = step;
  const skippedBefore = task.skipped.count;
  const outcome = await recorder.phase('step', () => task.step(step));
  const every = config.evaluation.every;
  const due = every > 0 && (step % every === 0 || step === config.steps);
  const evaluation = due ? await evaluate(run) : undefined;
  const skipped = step === 1 ? task.skipped.count : task.skipped.count - skippedBefore;
  const metrics: MetricsRow = {
    step,
    ...outcome.metrics,
    learningRate: learningRateAt(step, config.optimizer, config.steps),
    ...(skipped > 0 ? { 'data.skipped': task.skipped.count } : {}),
    ...evaluation?.metrics,
    ...recorder.take(),
  };
  if (outcome.samples.length > 0) await folder.writeSamples('step', step, outcome.samples);
  if (evaluation) await folder.writeSamples('eval', step, evaluation.samples);
  await folder.appendMetrics(metrics);
  await recorder.flush();
  for (const warning of some(recorder.traceWarning())) yield { type: 'warning', step, ...warning };
  if (skipped > 0) {
    const message = `${task.skipped.count} rows were skipped so far (for example: ${task.skipped.example})`;
    yield { type: 'warning', code: 'DATA_SKIPPED', message, step };
  }
  yield { type: 'step', step, steps: config.steps, metrics };
  if (outcome.samples[0]) yield { type: 'sample', step, sample: outcome.samples[0] };
  if (evaluation) yield { type: 'evaluation', step, metrics, samples: evaluation.samples };
}

/** The evaluation of the model as it comes: a row of step 0. */
async function* evaluateBefore(run: Run): AsyncGenerator<TrainEvent> {
  if (run.config.evaluation.every === 0) return;
  const evaluation = await evaluate(run);
  if (!evaluation) return;
  const metrics: MetricsRow = { step: 0, ...evaluation.metrics, ...run.recorder.take() };
  await run.folder.writeSamples('eval', 0, evaluation.samples);
  await run.folder.appendMetrics(metrics);
  yield { type: 'evaluation', step: 0, metrics, samples: evaluation.samples };
}

async function evaluate({ recorder, task }: Run): Promise<Outcome | undefined> {
  return task.evaluate && recorder.phase('evaluation', () => task.evaluate!());
}
