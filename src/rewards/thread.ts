/**
 * A reward function in a worker thread: one that never returns can be ended, one that computes for long stops nothing else, and one
 * that prints cannot disturb the results on stdout.
 */
import { createRequire } from 'node:module';
import { extname } from 'node:path';
import { fileURLToPath } from 'node:url';
import { Worker } from 'node:worker_threads';
import { LockstepError } from '../errors.js';
import type { BuiltIn } from './built-in/registry.js';
import { type Batch, batchFailure, type Reward, timeOut, timerMilliseconds } from './reward-function.js';

/** What a thread runs: a file (`path`, `path#name`) or a built-in reward. */
export type ThreadSource = { readonly file: string } | { readonly builtIn: BuiltIn };

export interface ThreadOptions {
  /** What errors call the function and its thread. */
  readonly name: string;
  /** For each call of the function, and for loading it; then the thread is ended. */
  readonly timeoutSeconds: number;
  /** Ends the thread while it loads. */
  readonly signal?: AbortSignal | undefined;
}

export interface RewardThread extends AsyncDisposable {
  /**
   * The rewards of each batch, in order, checked by `scoreBatch`. Throws what that does, and `REWARD_TIMEOUT` or `REWARD_THREAD`
   * when the thread was ended or ended itself, naming the samples of the present call. When the signal fires the thread is ended.
   */
  score(batches: readonly Batch[], signal?: AbortSignal): Promise<Reward[][]>;
  /** Ends the thread; calls under way and later ones fail. */
  close(): Promise<void>;
}

/** Loads the entry where this package is not compiled: Node.js 20 cannot import TypeScript. */
const bootstrap = `
const { workerData } = require('node:worker_threads');
require(workerData.jiti).createJiti(workerData.entry).import(workerData.entry);
`;

function startWorker(data: ThreadData): Worker {
  const extension = extname(import.meta.url);
  const entry = new URL(`./reward-thread${extension}`, import.meta.url);
  if (extension === '.js') return new Worker(entry, { workerData: data });
  const jiti = createRequire(import.meta.url).resolve('jiti');
  return new Worker(bootstrap, { eval: true, workerData: { ...data, jiti, entry: fileURLToPath(entry) } });
}

/** Of the thread's entry. */
export interface ThreadData {
  readonly source: ThreadSource;
  readonly name: string;
}

/** What the thread says: that it loads the function, that it is ready, that it calls it, and how a request ended. */
export type ThreadMessage =
  | { readonly kind: 'loading' | 'ready' }
  | { readonly kind: 'call' /** Of the first sample. */; readonly begin: number; readonly count: number }
  | { readonly kind: 'rewards'; readonly rewards: Reward[][] }
  | {
      readonly kind: 'error';
      readonly code?: string | undefined;
      readonly message: string;
      readonly details?: object | undefined;
    };

/**
 * Starts a thread and loads its function. It does not keep the process alive between calls. Throws what `loadReward` and the
 * built-in rewards do, `REWARD_TIMEOUT`, and the signal's reason.
 */
export async function openThread(source: ThreadSource, options: ThreadOptions): Promise<RewardThread> {
  options.signal?.throwIfAborted();
  const worker = startWorker({ source, name: options.name });
  const thread = new Thread(worker, options);
  try {
    await thread.ready(options.signal);
  } catch (error) {
    await thread.close();
    throw error;
  }
  return thread;
}

interface Request {
  resolve(message: ThreadMessage): void;
  reject(error: unknown): void;
}

class Thread implements RewardThread {
  #request: Request | undefined;
  /** Of the present request, and what of it the function is called with. */
  #batches: readonly Batch[] = [];
  #batch: Batch | undefined;
  #timer: NodeJS.Timeout | undefined;
  #ended: { why: string; cause?: unknown } | undefined;

  constructor(
    private readonly worker: Worker,
    private readonly options: ThreadOptions,
  ) {
    worker.unref();
    worker.on('message', (message: ThreadMessage) => this.#receive(message));
    worker.on('error', (cause: unknown) => {
      this.#end(`it failed: ${cause instanceof Error ? cause.message : String(cause)}`, cause);
    });
    worker.on('exit', (exitCode) => this.#end(`it exited with code ${exitCode}`));
  }

  /** Waits for the function to be loaded. */
  ready(signal?: AbortSignal): Promise<ThreadMessage> {
    return this.#wait(() => {}, signal);
  }

  async score(batches: readonly Batch[], signal?: AbortSignal): Promise<Reward[][]> {
    signal?.throwIfAborted();
    if (batches.length === 0) return [];
    if (this.#request) throw new Error(`${this.options.name} is asked again before it has answered`);
    if (this.#ended) throw this.#endedError(batches[0]!);
    this.#batches = batches;
    this.#batch = batches[0]!;
    const answer = await this.#wait(() => this.worker.postMessage(batches), signal);
    return answer.kind === 'rewards' ? answer.rewards : [];
  }

  async close(): Promise<void> {
    this.#end('it was closed');
    await this.worker.terminate();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }

  /** One request at a time. */
  async #wait(send: () => void, signal: AbortSignal | undefined): Promise<ThreadMessage> {
    const stop = () => this.#fail(signal!.reason);
    signal?.addEventListener('abort', stop, { once: true });
    try {
      return await new Promise((resolve, reject) => {
        this.#request = { resolve, reject };
        this.worker.ref();
        send();
      });
    } finally {
      signal?.removeEventListener('abort', stop);
    }
  }

  #receive(message: ThreadMessage): void {
    switch (message.kind) {
      case 'loading':
        this.#time(() => loadTimeOut(this.options));
        return;
      case 'call':
        this.#batch = this.#part(message);
        this.#time(() => timeOut(this.#batch!, this.options));
        return;
      case 'error':
        this.#settle((request) => request.reject(revive(message)));
        return;
      default:
        this.#settle((request) => request.resolve(message));
    }
  }

  /** From now on what the thread does may take its time, and no longer. */
  #time(error: () => LockstepError): void {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#fail(error()), timerMilliseconds(this.options.timeoutSeconds));
  }

  #part({ begin, count }: { begin: number; count: number }): Batch {
    const whole = this.#batches.find((batch) => begin < batch.begin + batch.samples.length)!;
    return { samples: whole.samples.slice(begin - whole.begin, begin - whole.begin + count), begin };
  }

  #settle(how: (request: Request) => void): void {
    clearTimeout(this.#timer);
    this.worker.unref();
    const request = this.#request;
    this.#request = undefined;
    if (request) how(request);
  }

  /** Ends the thread in the middle of a call. */
  #fail(error: unknown): void {
    this.#settle((request) => request.reject(error));
    this.#end('a call before was ended', error);
    void this.worker.terminate();
  }

  #end(why: string, cause?: unknown): void {
    this.#ended ??= { why, cause };
    this.#settle((request) => request.reject(this.#endedError(this.#batch)));
  }

  #endedError(batch: Batch | undefined): LockstepError {
    const { name } = this.options;
    const { why, cause } = this.#ended!;
    if (batch) return batchFailure('REWARD_THREAD', batch, `has no thread any more: ${why}`, { name, cause });
    return new LockstepError('REWARD_THREAD', `${name} could not be loaded: ${why}.`, {}, { cause });
  }
}

function loadTimeOut({ name, timeoutSeconds }: ThreadOptions): LockstepError {
  return new LockstepError(
    'REWARD_TIMEOUT',
    `${name} was not ready within ${timeoutSeconds} s while loading. Make what its file does before the first call faster, or raise ` +
      "the reward's timeoutSeconds.",
    { timeoutSeconds },
  );
}

function revive({ code, message, details }: Extract<ThreadMessage, { kind: 'error' }>): Error {
  if (code === undefined) return new Error(message);
  return new LockstepError(code as LockstepError['code'], message, (details ?? {}) as LockstepError['details']);
}
