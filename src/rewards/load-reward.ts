/**
 * Reward functions from files. TypeScript and JavaScript load through jiti, as Node 20 cannot import TypeScript. `openReward`
 * gives the file a thread of its own, so that a function that never returns can be ended and one that prints cannot
 * disturb the results on stdout.
 */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { extname, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { createJiti } from 'jiti';
import { LockstepError } from '../errors.js';
import type { Reward, RewardFunction } from './reward-function.js';

/** Exports as they are written, the file as it is now, nothing written to disk. */
const jitiOptions = { interopDefault: false, moduleCache: false, fsCache: false };

/**
 * Loads the reward function of a file into this thread: `path`, or `path#name` for a named export. Without a name it is the
 * default export, else the export `reward`, else the only exported function. Throws `REWARD_FILE_MISSING`,
 * `REWARD_FILE_BROKEN` (it does not load) or `REWARD_EXPORT` (no such function).
 */
export async function loadReward(specifier: string): Promise<RewardFunction> {
  const { file, name } = parse(specifier);
  let exported: Record<string, unknown>;
  try {
    exported = await createJiti(import.meta.url, jitiOptions).import<Record<string, unknown>>(file);
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new LockstepError(
      'REWARD_FILE_BROKEN',
      `The reward file ${file} does not load: ${reason}`,
      { file },
      { cause },
    );
  }
  const functions = Object.keys(exported).filter((key) => typeof exported[key] === 'function');
  const [only] = functions;
  const chosen = name ?? ['default', 'reward'].find((key) => functions.includes(key)) ?? only;
  const ambiguous =
    name === undefined && chosen === only && chosen !== 'default' && chosen !== 'reward' && functions.length > 1;
  if (chosen === undefined || ambiguous || !functions.includes(chosen)) {
    throw new LockstepError(
      'REWARD_EXPORT',
      `The reward file ${file} exports ${functions.length > 0 ? `the functions ${functions.join(', ')}` : 'no function'}, but ` +
        `${name === undefined ? 'a default export or one named "reward"' : `"${name}"`} was expected. Export it, or name ` +
        'one with path#name.',
      { file, functions },
    );
  }
  return exported[chosen] as RewardFunction;
}

/** A reward function in a thread of its own. */
export interface OpenReward extends AsyncDisposable {
  /** Aborting the signal of a call ends the thread; later calls then fail. */
  readonly reward: RewardFunction;
  close(): Promise<void>;
}

/** Loads a reward file (see `loadReward`) into a thread. The thread does not keep the process alive between calls. */
export async function openReward(specifier: string): Promise<OpenReward> {
  const { file } = parse(specifier);
  const worker = new Worker(bootstrap, {
    eval: true,
    workerData: {
      jiti: createRequire(import.meta.url).resolve('jiti'),
      thread: fileURLToPath(new URL(`./reward-thread${extname(import.meta.url)}`, import.meta.url)),
      specifier,
    },
  });
  const calls = new Calls(worker, file);
  const close = async () => void (await worker.terminate());
  try {
    await calls.next(undefined);
  } catch (error) {
    await close();
    throw error;
  }
  return {
    reward(samples, { signal }) {
      signal.addEventListener('abort', close, { once: true });
      const answer = calls.next(samples).finally(() => signal.removeEventListener('abort', close));
      return answer as Promise<Reward[]>;
    },
    close,
    [Symbol.asyncDispose]: close,
  };
}

/** The thread's entry is a module of this package, which may be TypeScript; jiti loads either. */
const bootstrap = `
const { workerData } = require('node:worker_threads');
require(workerData.jiti).createJiti(workerData.thread).import(workerData.thread);
`;

/** What the thread answers, to its loading and to each call. */
export type ThreadAnswer =
  | { readonly rewards: unknown }
  | { readonly error: { readonly code?: string | undefined; readonly message: string; readonly details?: unknown } };

interface Waiting {
  resolve(rewards: unknown): void;
  reject(error: Error): void;
}

/** Calls are answered in order. */
class Calls {
  private readonly waiting: Waiting[] = [];
  private ended: Error | undefined;

  constructor(
    private readonly worker: Worker,
    file: string,
  ) {
    worker.unref();
    worker.on('message', (answer: ThreadAnswer) => this.answer(answer));
    worker.on('error', (error) => this.end(error));
    worker.on('exit', () => this.end(new Error(`the thread of the reward file ${file} has ended`)));
  }

  /** Sends samples (undefined: waits for the file to be loaded). */
  next(samples: unknown): Promise<unknown> {
    if (this.ended) return Promise.reject(this.ended);
    this.worker.ref();
    return new Promise((resolve, reject) => {
      this.waiting.push({ resolve, reject });
      if (samples !== undefined) this.worker.postMessage(samples);
    });
  }

  private answer(answer: ThreadAnswer): void {
    const call = this.waiting.shift();
    if (this.waiting.length === 0) this.worker.unref();
    if ('rewards' in answer) call?.resolve(answer.rewards);
    else call?.reject(revive(answer.error));
  }

  private end(error: Error): void {
    this.ended ??= error;
    for (const call of this.waiting.splice(0)) call.reject(this.ended);
  }
}

function revive({ code, message, details }: Extract<ThreadAnswer, { error: unknown }>['error']): Error {
  if (code === undefined) return new Error(message);
  return new LockstepError(code as LockstepError['code'], message, details as LockstepError['details']);
}

function parse(specifier: string): { file: string; name: string | undefined } {
  const whole = resolve(specifier);
  const hash = specifier.lastIndexOf('#');
  const split = hash > 0 && !existsSync(whole);
  const file = split ? resolve(specifier.slice(0, hash)) : whole;
  if (!existsSync(file)) {
    throw new LockstepError(
      'REWARD_FILE_MISSING',
      `There is no reward file ${file}. Paths are relative to the current directory; check reward.function.`,
      { file },
    );
  }
  return { file, name: split ? specifier.slice(hash + 1) : undefined };
}
