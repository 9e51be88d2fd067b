/**
 * One live run per folder. The lock names the process and its start time, so that a lock whose process has died (or whose
 * number another process has taken since) is recognised and taken over.
 */
import { link, open, readFile, rename, rm } from 'node:fs/promises';
import { hostname } from 'node:os';
import { join } from 'node:path';
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
  for (let attempt = 0; attempt < 10; attempt++) {
    if (await create(path, own)) return { release: () => rm(path, { force: true }) };
    const found = await readFile(path, 'utf8').catch(() => '');
    if (found === '' && attempt < 5) {
      // Its writer is between creating and filling it, or has just released it.
      await new Promise((resolve) => setTimeout(resolve, 20));
      continue;
    }
    const holder = parseHolder(found);
    if (holder && (await isAlive(holder))) throw locked(folder, path, holder);
    await removeStale(path, found);
  }
  throw locked(folder, path, undefined);
}

async function create(path: string, text: string): Promise<boolean> {
  try {
    const file = await open(path, 'wx');
    await file.writeFile(text).finally(() => file.close());
    return true;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'EEXIST') return false;
    throw error;
  }
}

/** Moves a dead process's lock away; a lock that another process has put there meanwhile is put back. */
async function removeStale(path: string, expected: string): Promise<void> {
  const aside = `${path}-${process.pid}`;
  try {
    await rename(path, aside);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return;
    throw error;
  }
  if ((await readFile(aside, 'utf8')) !== expected) await link(aside, path).catch(() => undefined);
  await rm(aside, { force: true });
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
  try {
    process.kill(pid, 0);
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
  return (await startOf(pid)) === started;
}

/** The 22nd field of /proc/PID/stat; the second, a name in parentheses, may hold spaces. A zombie counts as gone. */
async function startOf(pid: number): Promise<string> {
  const stat = await readFile(`/proc/${pid}/stat`, 'utf8').catch(() => '');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return fields[0] === 'Z' ? 'gone' : (fields[19] ?? '');
}

function locked(folder: string, path: string, holder: Holder | undefined): LockstepError {
  const who = holder ? `process ${holder.pid} on ${holder.host}` : 'another process';
  return new LockstepError(
    'RUN_LOCKED',
    `${folder} is in use by ${who}; wait for it, choose another output, or remove ${path} if that process is gone`,
    { folder, ...holder },
  );
}
