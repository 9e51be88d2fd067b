/**
 * One live run per folder. The lock names the process and its start time, so that a lock whose process has died (or whose
 * number another process has taken since) is recognised and taken over.
 */
import { link, readdir, readFile, rename, rm, writeFile } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
import { readTextIfPresent } from '../checkpoints/files.js';
import { LockstepError } from '../errors.js';

interface Holder {
  pid: number;
  /** Clock ticks after boot, from /proc; distinguishes processes that had the same number. */
  started: string;
  host: string;
}

export interface RunLock {
  release(): Promise<void>;
}

/** @throws LockstepError RUN_LOCKED when a live process holds the folder. */
export async function lockRun(folder: string): Promise<RunLock> {
  const path = join(folder, '.lock');
  const own = JSON.stringify({ pid: process.pid, started: await startOf(process.pid), host: hostname() } as Holder);
  const holder = await acquire(path, own);
  if (holder) throw locked(folder, path, holder);
  await removeLeavings(folder);
  return { release: () => rm(path, { force: true }) };
}

/**
 * Makes the lock its own, or returns the live process that has it. A dead one's lock is replaced by whoever holds the lock of the
 * right to replace it: it is never absent meanwhile, so nobody can make another.
 */
async function acquire(path: string, own: string): Promise<Holder | undefined> {
  for (;;) {
    if (await create(path, own)) return undefined;
    const found = await readTextIfPresent(path);
    if (found === undefined) continue; // released since
    const holder = parseHolder(found);
    if (holder && (await isAlive(holder))) return holder;
    const right = `${path}-claim`;
    if (await acquire(right, own)) {
      await new Promise((resolve) => setTimeout(resolve, 20));
      continue;
    }
    try {
      if ((await readTextIfPresent(path)) === found) {
        await rename(await written(path, own), path);
        return undefined;
      }
    } finally {
      await rm(right, { force: true });
    }
  }
}

let files = 0;

/** A file of its own beside the lock. */
async function written(path: string, text: string): Promise<string> {
  const name = `${path}-${process.pid}-${files++}`;
  await writeFile(name, text);
  return name;
}

/** What a process left behind that was killed between writing its text and linking it. */
async function removeLeavings(folder: string): Promise<void> {
  for (const name of await readdir(folder)) {
    const pid = /^\.lock-(?:claim-)?(\d+)-\d+$/.exec(name)?.[1];
    if (pid === undefined || exists(Number(pid))) continue;
    await rm(join(folder, name), { force: true });
  }
}

/** The lock appears with its text, or not at all. */
async function create(path: string, text: string): Promise<boolean> {
  const name = await written(path, text);
  try {
    await link(name, path);
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false;
    throw error;
  } finally {
    await rm(name, { force: true });
  }
}

function parseHolder(text: string): Holder | undefined {
  try {
    const { pid, started, host } = JSON.parse(text) as Holder;
    return Number.isInteger(pid) && pid > 0 ? { pid, started, host } : undefined;
  } catch {
    return undefined;
  }
}

async function isAlive({ pid, started, host }: Holder): Promise<boolean> {
  if (host !== hostname()) return true;
  return exists(pid) && (await startOf(pid)) === started;
}

function exists(pid: number): boolean {
  try {
    return process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}

/** The 22nd field of /proc/PID/stat; the second, a name in parentheses, may hold spaces. A zombie counts as gone. */
async function startOf(pid: number): Promise<string> {
  const stat = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => '');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return fields[0] === 'Z' ? 'gone' : (fields[19] ?? '');
}

function locked(folder: string, path: string, holder: Holder): LockstepError {
  const who = `process ${holder.pid} on ${holder.host}`;
  return new LockstepError(
    'RUN_LOCKED',
    `${folder} is in use by ${who}; wait for it, choose another output, or remove ${path} if that process is gone`,
    { folder, ...holder },
  );
}
