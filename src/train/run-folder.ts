/**
 * A run's folder: config.yaml (resolved), device.json (what computes), metrics.jsonl (one row per step), checkpoints/step-000020/,
 * rollouts/, trace.json.
 * Nothing here knows what is trained.
 */
import { type FileHandle, mkdir, open, readdir, rename, rm, rmdir, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { parse as parseYaml } from 'yaml';
import { isSystemError, readTextIfPresent } from '../checkpoints/files.js';
import { awaitedLater } from '../engine/device.js';
import { LockstepError } from '../errors.js';
import type { Config } from './config.js';
import type { MetricsRow, Sample } from './events.js';
import type { Architecture } from './gpus.js';
import { lockRun, type RunLock } from './lock.js';

const stepPattern = /^step-(\d{6,})$/;
const leftoverPattern = /^\.(saving|removing|writing)-/;

export class RunFolder {
  #metrics: FileHandle | undefined;

  private constructor(
    /** Absolute. */
    readonly path: string,
    private readonly lock: RunLock,
  ) {}

  /**
   * Makes the folder if need be and takes its lock.
   *
   * @throws LockstepError RUN_LOCKED; RUN_EXISTS when it holds a run and `resume` is not set; RUN_FOLDER when it cannot be
   * made, read or written.
   */
  static async open(output: string, { resume }: { resume: boolean }): Promise<RunFolder> {
    const path = resolve(output);
    const lock = await guard(path, async () => {
      await mkdir(path, { recursive: true });
      return lockRun(path);
    });
    const folder = new RunFolder(path, lock);
    try {
      if (!resume && (await folder.holdsRun())) {
        throw new LockstepError(
          'RUN_EXISTS',
          `${path} already holds a run; continue it with --resume, or choose another output`,
          { output: path },
        );
      }
      if (resume) await guard(path, () => folder.removeLeftovers());
      return folder;
    } catch (error) {
      await folder.close();
      throw error;
    }
  }

  /** Whether a run has begun here: its configuration is the first file a run writes. */
  async holdsRun(): Promise<boolean> {
    const names = await readable(this.path, () => readdir(this.path));
    return names.some((name) => ['config.yaml', 'metrics.jsonl', 'checkpoints'].includes(name));
  }

  /** The resolved configuration of the run that is here. @throws LockstepError RUN_FOLDER */
  config(): Promise<Config | undefined> {
    return this.#read('config.yaml', (text) => parseYaml(text) as Config);
  }

  /** What computed the run that is here; undefined when it does not say. @throws LockstepError RUN_FOLDER */
  architecture(): Promise<Architecture | undefined> {
    return this.#read('device.json', (text) => JSON.parse(text) as Architecture);
  }

  /** Writes the configuration and what computes, drops rows and texts past `step`, and opens metrics.jsonl. */
  async begin(config: string, architecture: Architecture, step: number): Promise<void> {
    await guard(this.path, async () => {
      await this.#replace('config.yaml', config);
      await this.#replace('device.json', `${JSON.stringify(architecture)}\n`);
      await mkdir(join(this.path, 'checkpoints'), { recursive: true });
      await mkdir(join(this.path, 'rollouts'), { recursive: true });
      await this.#dropRowsPast(step);
      await this.#dropRolloutsPast(step);
      this.#metrics = await open(join(this.path, 'metrics.jsonl'), 'a');
    });
  }

  async appendMetrics(row: MetricsRow): Promise<void> {
    await guard(this.path, () => this.#metrics!.appendFile(`${JSON.stringify(row)}\n`));
  }

  /** `kind` is `step` for texts that were trained on, `eval` for an evaluation's. */
  async writeSamples(kind: 'step' | 'eval', step: number, samples: readonly Sample[]): Promise<void> {
    const lines = samples.map((sample) => `${JSON.stringify(sample)}\n`).join('');
    await guard(this.path, () => this.#replace(join('rollouts', `${kind}-${digits(step)}.jsonl`), lines));
  }

  /** Complete checkpoints, oldest first. @throws LockstepError RUN_FOLDER */
  async checkpoints(): Promise<{ step: number; directory: string }[]> {
    const directory = join(this.path, 'checkpoints');
    const names = await readable(directory, () => readdir(directory).catch(noneIfAbsent));
    return names
      .flatMap((name) => {
        const match = stepPattern.exec(name);
        return match ? [{ step: Number(match[1]), directory: join(directory, name) }] : [];
      })
      .sort((a, b) => a.step - b.step);
  }

  /**
   * Begins a checkpoint: `fill` begins to write into a directory beside. When all is written and synced, the directory is renamed
   * into place, so that checkpoints/ never holds an incomplete one, and all but the newest `keep` are removed; then `written`
   * resolves. One at a time.
   *
   * @throws LockstepError CHECKPOINT_WRITE_FAILED, here or from `written`; nothing is left of the checkpoint then.
   */
  async beginCheckpoint<Filling extends { written: Promise<void> }>(
    step: number,
    keep: number,
    fill: (directory: string) => Promise<Filling>,
  ): Promise<Filling & { directory: string }> {
    const name = `step-${digits(step)}`;
    const saving = join(this.path, `.saving-${name}`);
    const directory = join(this.path, 'checkpoints', name);
    const filling = await orNoCheckpoint(directory, saving, async () => {
      await rm(saving, { recursive: true, force: true });
      await mkdir(saving);
      return fill(saving);
    });
    const finish = () =>
      orNoCheckpoint(directory, saving, async () => {
        await filling.written;
        await syncTree(saving);
        await this.#metrics?.sync();
        await rename(saving, directory);
        await syncDirectory(join(this.path, 'checkpoints'));
        await this.#retain(keep);
      });
    return { ...filling, directory, written: awaitedLater(finish()) };
  }

  async removeLeftovers(): Promise<void> {
    for (const name of await readdir(this.path)) {
      if (leftoverPattern.test(name)) await rm(join(this.path, name), { recursive: true, force: true });
    }
  }

  /** Releases the lock; a folder in which nothing was written is removed. */
  async close(): Promise<void> {
    await this.#metrics?.close();
    this.#metrics = undefined;
    await this.lock.release();
    await rmdir(this.path).catch(() => undefined);
  }

  async #retain(keep: number): Promise<void> {
    const old = (await this.checkpoints()).slice(0, -keep);
    for (const { step, directory } of old) {
      const removing = join(this.path, `.removing-step-${digits(step)}`);
      await rename(directory, removing);
      await rm(removing, { recursive: true, force: true });
    }
  }

  async #dropRowsPast(step: number): Promise<void> {
    const text = await this.#read('metrics.jsonl', (rows) => rows);
    const rows = (text ?? '').split('\n').filter((line) => {
      const row = parseRow(line);
      return row !== undefined && row.step <= step && step > 0;
    });
    await this.#replace('metrics.jsonl', rows.map((line) => `${line}\n`).join(''));
  }

  async #dropRolloutsPast(step: number): Promise<void> {
    for (const name of await readdir(join(this.path, 'rollouts'))) {
      const match = /^(?:step|eval)-(\d+)\.jsonl$/.exec(name);
      if (match && (step === 0 || Number(match[1]) > step)) await rm(join(this.path, 'rollouts', name));
    }
  }

  /** What a file of the folder says; undefined when there is none. */
  #read<T>(name: string, parse: (text: string) => T): Promise<T | undefined> {
    const path = join(this.path, name);
    return readable(path, async () => {
      const text = await readTextIfPresent(path);
      return text === undefined ? undefined : parse(text);
    });
  }

  /** Readers see the old text or the new, never a part. */
  async #replace(name: string, text: string): Promise<void> {
    const temporary = join(this.path, `.writing-${name.replaceAll('/', '-')}`);
    await writeFile(temporary, text, { flush: true });
    await rename(temporary, join(this.path, name));
  }
}

function digits(step: number): string {
  return String(step).padStart(6, '0');
}

function parseRow(line: string): MetricsRow | undefined {
  try {
    const row = JSON.parse(line) as MetricsRow | null;
    return typeof row?.step === 'number' ? row : undefined;
  } catch {
    return undefined;
  }
}

async function guard<T>(path: string, write: () => Promise<T>): Promise<T> {
  try {
    return await write();
  } catch (error) {
    if (LockstepError.isInstance(error)) throw error;
    throw new LockstepError(
      'RUN_FOLDER',
      `cannot write the run folder ${path}: ${(error as Error).message}; choose a writable output with free space`,
      { output: path },
      { cause: error },
    );
  }
}

/** A file or folder that cannot be read is not one that is absent: what was there would be taken for lost, and dropped. */
async function readable<T>(path: string, read: () => Promise<T>): Promise<T> {
  try {
    return await read();
  } catch (error) {
    const advice = isSystemError(error) ? 'make it readable' : 'restore it, or remove it to continue without it';
    throw new LockstepError(
      'RUN_FOLDER',
      `cannot read ${path} of the run: ${(error as Error).message}; ${advice}`,
      { path },
      { cause: error },
    );
  }
}

function noneIfAbsent(error: unknown): string[] {
  if (isSystemError(error) && error.code === 'ENOENT') return [];
  throw error;
}

/** Runs `work`, which fills `saving` or puts it in place as `directory`; when it fails nothing of it stays. */
async function orNoCheckpoint<T>(directory: string, saving: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    await rm(saving, { recursive: true, force: true }).catch(() => undefined);
    if (LockstepError.isInstance(error)) throw error;
    throw new LockstepError(
      'CHECKPOINT_WRITE_FAILED',
      `cannot save ${directory}: ${(error as Error).message}; earlier checkpoints are intact: free space or make it writable, then resume`,
      { directory },
      { cause: error },
    );
  }
}

/** Makes a tree's files and names durable, so that the rename that follows never outlives its contents. */
async function syncTree(directory: string): Promise<void> {
  for (const entry of await readdir(directory, { withFileTypes: true })) {
    const path = join(directory, entry.name);
    if (entry.isDirectory()) await syncTree(path);
    else await syncDirectory(path);
  }
  await syncDirectory(directory);
}

async function syncDirectory(path: string): Promise<void> {
  const handle = await open(path, 'r');
  await handle.sync().finally(() => handle.close());
}
