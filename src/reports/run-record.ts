/**
 * A run folder as it lies on disk, read without touching it: config.yaml, metrics.jsonl, rollouts/. A run that is still
 * going, or was killed in the middle of a line, reads as far as it got.
 */
import { readdir, readFile, stat } from 'node:fs/promises';
import { basename, join, resolve } from 'node:path';
import { parse as parseYaml } from 'yaml';
import { LockstepError } from '../errors.js';
import type { MetricsRow, Sample } from '../train/events.js';

/** The samples of one step, as one file of rollouts/ holds them. */
export interface SampleSet {
  step: number;
  samples: Sample[];
}

export interface RunRecord {
  /** Absolute. */
  folder: string;
  name: string;
  /** The resolved configuration; empty when the file is missing or unreadable. */
  config: Record<string, unknown>;
  /** Ascending by step. */
  rows: MetricsRow[];
  /** Lines of metrics.jsonl that are no rows: a cut last line, or damage. */
  unreadableLines: number;
  /** Samples of evaluations, oldest first; step 0 is before training. */
  evaluations: SampleSet[];
  /** Samples that were trained on, oldest first. */
  rollouts: SampleSet[];
  /** Steps of the complete checkpoints. */
  checkpoints: number[];
}

/**
 * Reads a run folder.
 *
 * @throws LockstepError RUN_NOT_FOUND when there is no such folder, or nothing of a run in it.
 */
export async function readRun(path: string): Promise<RunRecord> {
  const folder = resolve(path);
  const isFolder = await stat(folder).then(
    (entry) => entry.isDirectory(),
    () => false,
  );
  const metrics = await readFile(join(folder, 'metrics.jsonl'), 'utf8').catch(() => undefined);
  const config = await readFile(join(folder, 'config.yaml'), 'utf8').catch(() => undefined);
  if (metrics === undefined && config === undefined) {
    throw new LockstepError(
      'RUN_NOT_FOUND',
      isFolder
        ? `${folder} holds no run (expected config.yaml and metrics.jsonl); give the folder that the configuration's output names`
        : `there is no folder ${folder}; give the folder that the configuration's output names`,
      { folder },
    );
  }
  const lines = parseLines<MetricsRow>(metrics ?? '', (row) => typeof row.step === 'number');
  return {
    folder,
    name: basename(folder),
    config: parseConfig(config ?? ''),
    rows: lines.values.sort((a, b) => a.step - b.step),
    unreadableLines: lines.unreadable,
    evaluations: await readSamples(folder, 'eval'),
    rollouts: await readSamples(folder, 'step'),
    checkpoints: await readCheckpoints(folder),
  };
}

function parseConfig(text: string): Record<string, unknown> {
  try {
    const value: unknown = parseYaml(text);
    return typeof value === 'object' && value !== null ? (value as Record<string, unknown>) : {};
  } catch {
    return {};
  }
}

function parseLines<T extends object>(
  text: string,
  accept: (value: T) => boolean,
): { values: T[]; unreadable: number } {
  const values: T[] = [];
  let unreadable = 0;
  for (const line of text.split('\n')) {
    if (line.trim() === '') continue;
    try {
      const value = JSON.parse(line) as T | null;
      if (typeof value !== 'object' || value === null || !accept(value)) throw new SyntaxError('not a row');
      values.push(value);
    } catch {
      unreadable += 1;
    }
  }
  return { values, unreadable };
}

async function readSamples(folder: string, kind: 'eval' | 'step'): Promise<SampleSet[]> {
  const names = await readdir(join(folder, 'rollouts')).catch(() => []);
  const files = names
    .map((name) => ({ name, match: /^(eval|step)-(\d+)\.jsonl$/.exec(name) }))
    .filter(({ match }) => match?.[1] === kind)
    .map(({ name, match }) => ({ name, step: Number(match![2]) }))
    .sort((a, b) => a.step - b.step);
  // Only the ends are compared; a long run keeps hundreds of these files.
  const ends = files.length > 2 ? [files[0]!, files.at(-1)!] : files;
  return Promise.all(
    ends.map(async ({ name, step }) => {
      const text = await readFile(join(folder, 'rollouts', name), 'utf8');
      return { step, samples: parseLines<Sample>(text, () => true).values };
    }),
  );
}

async function readCheckpoints(folder: string): Promise<number[]> {
  const names = await readdir(join(folder, 'checkpoints')).catch(() => []);
  return names
    .flatMap((name) => /^step-(\d+)$/.exec(name)?.[1] ?? [])
    .map(Number)
    .sort((a, b) => a - b);
}

/** Whether the policy is measured against a teacher that it is to come close to, and not against where it began. */
export const hasTeacher = ({ config }: Pick<RunRecord, 'config'>): boolean => config.teacher !== undefined;

/** Whether `reward.model` is one of several terms, and not the score of them all. */
export const hasTermNamedModel = ({ config: { reward } }: Pick<RunRecord, 'config'>): boolean =>
  Array.isArray(reward) && reward.length > 1 && reward.some((term) => term?.name === 'model');

/** A setting in the section of the run's algorithm, and its path: `grpo.epochs`. */
export function settingOf(
  { config }: Pick<RunRecord, 'config'>,
  key: string,
): { path: string; value: unknown } | undefined {
  const { algorithm } = config;
  const section = typeof algorithm === 'string' ? config[algorithm] : undefined;
  if (typeof section !== 'object' || section === null || !(key in section)) return undefined;
  return { path: `${String(algorithm)}.${key}`, value: (section as Record<string, unknown>)[key] };
}
