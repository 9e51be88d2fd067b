/**
 * The quickstart: data and a small model made by script, fine-tuned, given a reward model, and improved with PPO; on held-out
 * prompts, the reward model's score and the language's own check say by how much. Three ordinary runs of `train()`.
 */
import { mkdir, readdir, rm, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { writeJson } from '../../checkpoints/files.js';
import { LockstepError } from '../../errors.js';
import { mean, moments } from '../../losses/statistics.js';
import type { MetricsRow, Sample, TrainEvent } from '../events.js';
import { lockRun } from '../lock.js';
import { type TrainOptions, train } from '../train.js';
import { quickstartConfigs, type Stage, stages } from './configs.js';
import { writeData } from './data.js';
import { checkAnswer } from './language.js';
import { writeStartingModel } from './model.js';

export interface QuickstartOptions extends Pick<TrainOptions, 'signal' | 'backend'> {
  /** Folder of everything the quickstart writes. Default runs/quickstart. */
  output?: string;
  /** Of data, starting weights and training. Default 0. */
  seed?: number;
}

/** Means and deviation over held-out prompts, one answer each: the fine-tuned policy before PPO, and after. */
export interface QuickstartSummary {
  /** The reward model's score. */
  before: number;
  after: number;
  /** Of the score before, over prompts. */
  standardDeviation: number;
  /** Share of the check's six points. */
  checkBefore: number;
  checkAfter: number;
  checkStandardDeviation: number;
  /** Largest difference between a sampled token's log-prob and the trainer's, over all tokens of all rollouts. */
  mismatchMax: number;
  mismatchTokens: number;
}

export type QuickstartEvent =
  /** An earlier quickstart in the folder is about to be replaced. */
  | { type: 'replacing'; output: string }
  | { type: 'prepared'; output: string; parameters: number; trainingRows: number; heldOutPrompts: number }
  /** What a stage's training run says. */
  | { type: 'stage'; stage: Stage; event: TrainEvent }
  | { type: 'interrupted'; output: string }
  | {
      type: 'done';
      output: string;
      summary: QuickstartSummary;
      /** The first held-out prompts, answered before and after. */
      samples: { before: Sample; after: Sample }[];
      /** Of the three stages together. */
      trainingSeconds: number;
    };

/** Marks a folder as a quickstart's, and so as one that a later quickstart may replace. */
const markerFile = 'quickstart.json';
const ownEntries: string[] = ['data', 'model', ...stages, 'summary.json', markerFile];
const shownSamples = 3;

/**
 * Runs the quickstart; what an earlier one left in the folder is replaced.
 *
 * @throws LockstepError QUICKSTART_FOLDER when the folder holds something else; RUN_LOCKED; what `train` throws.
 */
export async function* quickstart(options: QuickstartOptions = {}): AsyncGenerator<QuickstartEvent> {
  const { output = join('runs', 'quickstart'), seed = 0, signal, backend } = options;
  const folder = resolve(output);
  const earlier = await holdsQuickstart(folder);
  await mkdir(folder, { recursive: true });
  const lock = await lockRun(folder);
  try {
    if (earlier) {
      yield { type: 'replacing', output: folder };
      for (const name of ownEntries) await rm(join(folder, name), { recursive: true, force: true });
    }
    await writeJson(join(folder, markerFile), { seed });
    const rows = await writeData(join(folder, 'data'), seed);
    const parameters = await writeStartingModel(join(folder, 'model'), seed);
    const trainingRows = Object.values(rows.train).reduce((sum, { length }) => sum + length, 0);
    yield { type: 'prepared', output: folder, parameters, trainingRows, heldOutPrompts: rows.heldOut.prompts.length };
    const record = new PpoRecord();
    const configs = quickstartConfigs(output, seed);
    let trainingSeconds = 0;
    for (const stage of stages) {
      for await (const event of train(configs[stage], {
        ...(signal ? { signal } : {}),
        ...(backend ? { backend } : {}),
      })) {
        if (stage === 'ppo') record.add(event);
        if (event.type === 'done') trainingSeconds += event.seconds;
        yield { type: 'stage', stage, event };
        if (event.type === 'interrupted') return yield { type: 'interrupted', output: folder };
      }
    }
    const summary = record.summary();
    await writeFile(join(folder, 'summary.json'), `${JSON.stringify(summary, null, 2)}\n`);
    yield { type: 'done', output: folder, summary, samples: record.samples(shownSamples), trainingSeconds };
  } finally {
    await lock.release();
  }
}

/** True for a folder of a quickstart, finished or not; false for an empty or missing one. */
async function holdsQuickstart(folder: string): Promise<boolean> {
  const names = await readdir(folder).catch((error: NodeJS.ErrnoException): string[] => {
    if (error.code === 'ENOENT') return [];
    throw folderError(folder, `cannot be read (${error.message})`);
  });
  if (names.includes(markerFile)) return true;
  if (names.length === 0) return false;
  throw folderError(folder, `holds ${names.slice(0, 3).join(', ')}, which no quickstart has written`);
}

function folderError(folder: string, problem: string): LockstepError {
  const message = `${folder} ${problem}; name an empty or a new folder with --output DIR`;
  return new LockstepError('QUICKSTART_FOLDER', message, { folder });
}

/** What the PPO run says about its policy: the texts of the first and the last evaluation, and every step's canary. */
class PpoRecord {
  #before: readonly Sample[] = [];
  #after: readonly Sample[] = [];
  readonly #steps: MetricsRow[] = [];

  add(event: TrainEvent): void {
    if (event.type === 'step') this.#steps.push(event.metrics);
    if (event.type !== 'evaluation') return;
    if (event.step === 0) this.#before = event.samples;
    this.#after = event.samples;
  }

  summary(): QuickstartSummary {
    const [scores, checks] = [this.#before.map(scoreOf), this.#before.map(checkOf)];
    return {
      before: mean(scores),
      after: mean(this.#after.map(scoreOf)),
      standardDeviation: deviation(scores),
      checkBefore: mean(checks),
      checkAfter: mean(this.#after.map(checkOf)),
      checkStandardDeviation: deviation(checks),
      mismatchMax: Math.max(...this.#steps.map((row) => row['mismatch.max']!)),
      mismatchTokens: this.#steps.reduce((sum, row) => sum + row['mismatch.tokens']!, 0),
    };
  }

  samples(count: number): { before: Sample; after: Sample }[] {
    return this.#before.slice(0, count).map((before, i) => ({ before, after: this.#after[i]! }));
  }
}

const scoreOf = ({ reward }: Sample): number => reward!;
const checkOf = ({ prompt, response }: Sample): number => checkAnswer(prompt!, response!);

/** Of a sample (n − 1). */
const deviation = (x: readonly number[]): number => Math.sqrt(moments(x).variance);
