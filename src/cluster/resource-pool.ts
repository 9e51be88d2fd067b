/**
 * A resource pool is a named set of devices (HybridFlow [2409.19256], section 4.1). Workers of one pool are colocated: their calls
 * run one after the other, in the order in which they were made. Workers of different pools run at the same time, each as soon as
 * its inputs are there. That cannot deadlock: a call waits for the call before it in its pool and for its inputs, and both were made
 * earlier; so the earliest call that has not ended can always go on. Therefore calls are made by the controller alone (`POOL_NESTED`),
 * and an argument that is a promise of something else must not wait for a later call.
 */
import type { Awaitable } from '../data/awaitable.js';
import { LockstepError } from '../errors.js';
import {
  callContext,
  forwardAbort,
  inContext,
  linkedSignal,
  releaseController,
  unlessAborted,
} from './call-context.js';
import { type CallName, nameCall } from './call-error.js';
import { Future, heldOf, type Materialised, wholeOf } from './future.js';
import { type Silence, Watch } from './watch.js';
import { takesParts } from './worker-group.js';

export type DeviceId = string | number;

export interface ResourcePoolOptions {
  readonly name: string;
  readonly devices: readonly DeviceId[];
  /** Cancels all calls, for good. */
  readonly signal?: AbortSignal | undefined;
  /** A call that shows no sign of life for so long hangs; default 600. */
  readonly timeoutSeconds?: number;
  /** Runs the work of a turn, in it: what the phase needs is brought to the devices, its time is taken. Default: as it is. */
  readonly around?: <T>(phase: string, work: () => Promise<T>) => Promise<T>;
  /** Told of every answer of the pool that the controller awaits, once. */
  readonly onMaterialise?: (what: Materialised) => void;
}

/** A worker whose methods M are calls of a pool. */
export type Placed<W, M> = Omit<W, keyof M> & {
  readonly [K in keyof M & keyof W]: W[K] extends (...args: infer Args) => infer Answer
    ? (...args: { [I in keyof Args]: Awaitable<Args[I]> }) => Future<Awaited<Answer>>
    : never;
};

interface Call extends CallName {
  readonly phase: string;
}

const runAsItIs = <T>(_phase: string, work: () => Promise<T>): Promise<T> => work();

export class ResourcePool implements AsyncDisposable {
  readonly name: string;
  readonly devices: readonly DeviceId[];
  readonly #timeoutSeconds: number;
  readonly #around: NonNullable<ResourcePoolOptions['around']>;
  readonly #onMaterialise: ResourcePoolOptions['onMaterialise'];
  /** Fires when no call can run any more: the pool is cancelled, closed, or a call of it hangs. */
  readonly #end = releaseController();
  readonly #unlink: () => void;
  /** Settled when the latest turn is over. */
  #last: Promise<unknown> = Promise.resolve();
  #watch: Watch | undefined;

  private constructor(options: ResourcePoolOptions) {
    this.name = options.name;
    this.devices = options.devices;
    this.#timeoutSeconds = options.timeoutSeconds ?? 600;
    this.#around = options.around ?? runAsItIs;
    this.#onMaterialise = options.onMaterialise;
    this.#unlink = options.signal ? forwardAbort(options.signal, this.#end) : () => undefined;
  }

  /** Errors: `POOL_INVALID` for a pool without devices or with one twice. */
  static create(options: ResourcePoolOptions): ResourcePool {
    const { name, devices } = options;
    const twice = devices.find((device, i) => devices.indexOf(device) < i);
    if (devices.length > 0 && twice === undefined) return new ResourcePool(options);
    const problem = twice === undefined ? 'has no devices; expected at least one' : `has device ${twice} twice`;
    throw new LockstepError('POOL_INVALID', `Pool ${name} ${problem}.`, { pool: name, devices });
  }

  /**
   * The worker with the listed methods as calls of this pool, each under the name of a phase. They return at once, and take futures
   * in place of values. Errors: `POOL_INVALID` for a method that the worker lacks.
   *
   * A call rejects with the error of the worker, named by worker, method, rank and sample (`nameCall`); `WORKER_HUNG`;
   * `POOL_NESTED`; `POOL_CLOSED`; the reason of a signal; the error of the input that failed.
   */
  place<W extends object, const M extends Partial<Record<keyof W & string, string>>>(
    worker: string,
    target: W,
    methods: M,
  ): Placed<W, M> {
    const given = takesParts(target) ? (parts: unknown) => parts : wholeOf;
    const calls = new Map(
      Object.entries(methods as Readonly<Record<string, string>>).map(([method, phase]) => {
        const run = (target as Record<string, unknown>)[method];
        if (typeof run !== 'function') throw this.#without(worker, method);
        const call: Call = { pool: this.name, worker, method, phase };
        return [method, (...args: unknown[]) => this.#call(call, args, (held) => run.apply(target, held.map(given)))];
      }),
    );
    return new Proxy(target, {
      get: (object, key) => {
        const own = calls.get(key as string);
        if (own) return own;
        const value = Reflect.get(object, key, object) as unknown;
        return typeof value === 'function' ? value.bind(object) : value;
      },
    }) as unknown as Placed<W, M>;
  }

  #without(worker: string, method: string): LockstepError {
    const message = `Worker ${worker} of pool ${this.name} has no method ${method}; place it with methods that it has.`;
    return new LockstepError('POOL_INVALID', message, { pool: this.name, worker, method });
  }

  /** Runs work of the controller's in turn, in order with the calls. It has no time limit, and is not interrupted once it runs. */
  async turn<T>(work: () => Promise<T>): Promise<T> {
    this.#refuseNested('a turn');
    return this.#enqueue(async () => {
      this.#end.signal.throwIfAborted();
      return work();
    });
  }

  /** A sign of life of the pool's devices. */
  alive(what: string): void {
    this.#watch?.alive(what);
  }

  #call(call: Call, args: readonly unknown[], invoke: (held: readonly unknown[]) => unknown): Future<unknown> {
    const label = `${call.worker}.${call.method}`;
    const caller = callContext();
    const { signal, unlink } = linkedSignal([this.#end.signal, caller?.signal]);
    const inputs = Promise.all(args.map(heldOf));
    // When the call is released before it awaits them, nobody else does.
    inputs.catch(() => undefined);
    const start = async (): Promise<unknown> => {
      this.#refuseNested(label, caller?.running);
      return this.#enqueue(async () => {
        const held = await unlessAborted(inputs, signal);
        return this.#around(call.phase, async () => {
          signal.throwIfAborted();
          return this.#watched(call, signal, () => invoke(held));
        });
      });
    };
    const turn = start();
    turn.then(unlink, unlink);
    const answer = unlessAborted(turn, signal);
    caller?.supervisor?.watchOver(answer);
    const whole = (held: unknown) => {
      try {
        return wholeOf(held);
      } catch (error) {
        throw nameCall(error, call);
      }
    };
    return new Future(label, answer, { whole, onMaterialise: this.#onMaterialise });
  }

  #refuseNested(label: string, running = callContext()?.running): void {
    if (running === undefined) return;
    throw new LockstepError(
      'POOL_NESTED',
      `${running} called ${label} of pool ${this.name} while it was running. It would hold its pool's turn while it waits for another, ` +
        'which can last for ever; make the call where the first one was made, and pass on its future.',
      { pool: this.name, running, called: label },
    );
  }

  /** A turn is over when its work has ended, however it ended. */
  #enqueue<T>(work: () => Promise<T>): Promise<T> {
    const turn = this.#last.then(work);
    this.#last = turn.catch(() => undefined);
    return turn;
  }

  async #watched(call: Call, signal: AbortSignal, invoke: () => unknown): Promise<unknown> {
    let hang: (error: LockstepError) => void = () => undefined;
    const hung = new Promise<never>((_, reject) => {
      hang = reject;
    });
    const watch = new Watch(this.#timeoutSeconds, (silence) => {
      const error = this.#hung(call, silence);
      // Its turn is over, but its devices are still in its hands: nobody else gets them.
      this.#end.abort(error);
      hang(error);
    });
    this.#watch = watch;
    const context = { signal, alive: (what: string) => watch.alive(what), running: `${call.worker}.${call.method}` };
    const work = inContext(context, async () => heldOf(invoke())).catch((error) => {
      throw nameCall(error, call);
    });
    try {
      return await Promise.race([work, hung]);
    } finally {
      watch.stop();
    }
  }

  #hung({ worker, method, pool }: Call, { seconds, last }: Silence): LockstepError {
    const sign = last ? `the last was ${last.what}, ${last.seconds.toFixed(1)} s after it began` : 'there was none';
    return new LockstepError(
      'WORKER_HUNG',
      `${worker}.${method} has shown no sign of life for ${seconds.toFixed(1)} s (${sign}), and pool ${pool} waits for it no longer. ` +
        'Look at what it waits for; a run continues from its last checkpoint with --resume.',
      { pool, worker, method, seconds, ...(last ? { last: last.what } : {}) },
    );
  }

  /** Rejects calls that wait, releases the one that runs and waits for its end (unless it hangs). Idempotent. */
  async close(): Promise<void> {
    this.#end.abort(new LockstepError('POOL_CLOSED', `Pool ${this.name} is closed; no call can be made.`));
    await this.#last;
    this.#unlink();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}
