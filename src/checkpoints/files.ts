/** Files that are either complete or absent: written beside, flushed, renamed. */
import { mkdir, open, readFile, rename, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { LockstepError } from '../errors.js';

/** A single write of a file descriptor takes less than 2 GiB. */
const largestWrite = 1 << 28;

const hints: Readonly<Record<string, string>> = {
  ENOSPC: 'the disk is full: free space or choose another output folder',
  EDQUOT: 'the disk quota is used up: free space or choose another output folder',
  EROFS: 'the file system is read-only: choose another output folder',
  EACCES: 'permission denied: choose a folder that you may write to',
  EPERM: 'permission denied: choose a folder that you may write to',
  ENOTDIR: 'a part of the path is a file: choose another output folder',
  EFBIG: 'the file system or a limit allows no file of this size: choose another output folder',
};

interface SystemError extends Error {
  code: string;
  syscall: string;
}

export function isSystemError(error: unknown): error is SystemError {
  return error instanceof Error && 'code' in error && 'syscall' in error;
}

/** A system error while writing `path` as CHECKPOINT_WRITE_FAILED; anything else as it is. */
export function writeFailure(path: string, error: unknown): unknown {
  if (!isSystemError(error)) return error;
  const hint = hints[error.code] ?? 'see the cause';
  const message = `Cannot write ${path}: ${error.code}, ${hint}. Nothing incomplete is left under that name.`;
  return new LockstepError('CHECKPOINT_WRITE_FAILED', message, { path, cause: error.code }, { cause: error });
}

async function failWith<T>(path: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    throw writeFailure(path, error);
  }
}

/** Flushes a file, or a folder's entries, so that a rename in it survives a crash. */
export async function sync(path: string): Promise<void> {
  const handle = await open(path, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

export async function makeDirectory(directory: string): Promise<void> {
  await failWith(directory, () => mkdir(directory, { recursive: true }));
}

const partialOf = (path: string): string => `${path}.partial`;

/** Runs `work`; when it fails nothing of `path` stays. @throws CHECKPOINT_WRITE_FAILED */
async function orNothing<T>(path: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    await removePartial(path);
    throw writeFailure(path, error);
  }
}

/**
 * Makes a file beside `path` that begins with `head` and has `bytes` bytes: others fill it, then `finishPartial` puts it in place.
 * Returns its path.
 * @throws CHECKPOINT_WRITE_FAILED with path and cause
 */
export async function createPartial(path: string, head: Uint8Array, bytes: number): Promise<string> {
  return orNothing(path, async () => {
    const handle = await open(partialOf(path), 'w');
    try {
      await handle.writeFile(head);
      await handle.truncate(bytes);
    } finally {
      await handle.close();
    }
    return partialOf(path);
  });
}

/** @throws CHECKPOINT_WRITE_FAILED with path and cause */
export async function finishPartial(path: string): Promise<void> {
  await orNothing(path, async () => {
    await sync(partialOf(path));
    await rename(partialOf(path), path);
    await sync(dirname(path));
  });
}

export async function removePartial(path: string): Promise<void> {
  await rm(partialOf(path), { force: true }).catch(() => undefined);
}

/**
 * Writes `path` from chunks, all or nothing.
 * @throws CHECKPOINT_WRITE_FAILED with path and cause; errors of the chunks' producer pass unchanged.
 */
export async function writeAtomically(
  path: string,
  chunks: AsyncIterable<Uint8Array> | Iterable<Uint8Array>,
): Promise<void> {
  await orNothing(path, async () => {
    const handle = await open(partialOf(path), 'w');
    try {
      for await (const chunk of chunks) {
        for (let at = 0; at < chunk.byteLength; at += largestWrite)
          await handle.writeFile(chunk.subarray(at, at + largestWrite));
      }
    } finally {
      await handle.close();
    }
  });
  await finishPartial(path);
}

export async function writeJson(path: string, value: unknown): Promise<void> {
  await writeAtomically(path, [new TextEncoder().encode(`${JSON.stringify(value, null, 2)}\n`)]);
}

export async function removeFile(path: string): Promise<void> {
  await failWith(path, () => rm(path, { force: true }));
}

/** The text of a file, or undefined when there is none. */
export async function readTextIfPresent(path: string): Promise<string | undefined> {
  return (await readIfPresent(path))?.toString('utf8');
}

/** What a file holds, or undefined when there is none. */
export async function readIfPresent(path: string): Promise<Buffer | undefined> {
  try {
    return await readFile(path);
  } catch (error) {
    if (isSystemError(error) && (error.code === 'ENOENT' || error.code === 'ENOTDIR')) return undefined;
    throw error;
  }
}
