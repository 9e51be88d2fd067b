/**
 * The examples as a user runs them, on a quickstart's fine-tuned model and data: what they learn on held-out prompts. The table of
 * examples/README.md says which run, how each is measured, and by how much it has to improve.
 */
import { execFile } from 'node:child_process';
import { mkdir, readFile } from 'node:fs/promises';
import { basename, join, resolve } from 'node:path';
import { promisify } from 'node:util';
import { reward as points } from '../examples/quickstart/check.js';
import { quickstartConfigs, trainedModel } from '../src/train/quickstart/configs.js';
import { dataFile, writeData } from '../src/train/quickstart/data.js';
import { writeStartingModel } from '../src/train/quickstart/model.js';
import { train } from '../src/train/train.js';

/** A row of the table. */
export interface Example {
  /** Below examples/. */
  config: string;
  /** `points`: the check's, of six, an answer a held-out prompt at temperature 1. Or a metric of the run's evaluations. */
  measure: string;
  /** The least change from before to after; below zero for what has to fall. */
  margin: number;
}

const root = resolve(import.meta.dirname, '..');

/** The rows of the table, by configuration. */
export async function statedExamples(): Promise<Map<string, Example[]>> {
  const text = await readFile(join(root, 'examples', 'README.md'), 'utf8');
  const rows = text.matchAll(/^\| \[(\S+\.yaml)\]\(\1\) \|.*?\| `?([\w.]+)`? \| ([+−][\d.]+) \|/gm);
  const examples = new Map<string, Example[]>();
  for (const [, config, measure, margin] of rows) {
    const row = { config: config!, measure: measure!, margin: Number(margin!.replace('−', '-')) };
    examples.set(row.config, [...(examples.get(row.config) ?? []), row]);
  }
  return examples;
}

/** Makes a quickstart's data and its fine-tuned model. */
export async function prepare(folder: string, seed: number, signal?: AbortSignal): Promise<void> {
  await mkdir(folder, { recursive: true });
  await writeData(join(folder, 'data'), seed);
  await writeStartingModel(join(folder, 'model'), seed);
  for await (const event of train(quickstartConfigs(folder, seed).sft, signal ? { signal } : {})) {
    if (event.type === 'interrupted') throw new Error('interrupted');
  }
}

/** Runs an example in a prepared folder; of each measure the value before and after. */
export async function learn(
  folder: string,
  config: string,
  measures: readonly string[],
  seed: number,
): Promise<Record<string, { before: number; after: number }>> {
  const output = join(folder, basename(config, '.yaml'));
  const set = [...changes(folder, config), `output=${output}`, `seed=${seed}`];
  await lockstep(['train', join('examples', config), ...set.flatMap((setting) => ['--set', setting])]);
  const metrics = (await readFile(join(output, 'metrics.jsonl'), 'utf8')).trimEnd().split('\n');
  const [first, last] = [metrics[0]!, metrics.at(-1)!].map((line) => JSON.parse(line) as Record<string, number>);
  const mismatches = metrics.map((line) => (JSON.parse(line) as Record<string, number>)['mismatch.max'] ?? 0);
  if (mismatches.some((value) => value !== 0)) throw new Error(`${config}: the trainer and the rollout disagree`);
  const found: Record<string, { before: number; after: number }> = {};
  for (const measure of measures) {
    found[measure] =
      measure === 'points'
        ? {
            before: await pointsOf(trainedModel(folder, 'sft'), folder),
            after: await pointsOf(join(output, 'checkpoints', `step-${String(last!.step).padStart(6, '0')}`), folder),
          }
        : { before: first![measure]!, after: last![measure]! };
  }
  return found;
}

/** The same configuration on this folder's model and data; the teacher of the distillation is what the PPO example made. */
function changes(folder: string, config: string): string[] {
  const kinds: Record<string, 'pairs' | 'judged'> = { dpo: 'pairs', simpo: 'pairs', orpo: 'pairs', kto: 'judged' };
  const kind = kinds[basename(config, '.yaml')] ?? 'prompts';
  const own = config.startsWith('own-data/');
  const file = (part: 'train' | 'heldOut') => dataFile(join(folder, 'data'), kind, part);
  const data = own ? [] : [`data.train=${file('train')}`, `data.eval=${file('heldOut')}`];
  const teacher = config.startsWith('distillation/')
    ? [`teacher.model=${join(folder, 'ppo', 'checkpoints', 'step-000020')}`]
    : [];
  return [`model=${trainedModel(folder, 'sft')}`, ...data, ...teacher];
}

/** Mean of the check's points, of six, of an answer to each held-out prompt. */
async function pointsOf(model: string, folder: string): Promise<number> {
  const prompts = dataFile(join(folder, 'data'), 'prompts', 'heldOut');
  const answers = await lockstep(['generate', model, '--input', prompts, '--max-new-tokens', '40', '--json']);
  const rows = (await readFile(prompts, 'utf8')).trimEnd().split('\n');
  const texts = answers.trimEnd().split('\n');
  const samples = rows.map((row, i) => ({
    prompt: (JSON.parse(row) as { prompt: string }).prompt,
    response: (JSON.parse(texts[i]!) as { text: string }).text,
  }));
  const each = points(samples);
  return each.reduce((sum, value) => sum + value, 0) / each.length;
}

async function lockstep(args: readonly string[]): Promise<string> {
  const entry = join(root, 'dist', 'cli', 'main.js');
  const options = { cwd: root, maxBuffer: 64 * 1024 * 1024 };
  const { stdout } = await promisify(execFile)(process.execPath, [entry, ...args, '--quiet'], options);
  return stdout;
}
