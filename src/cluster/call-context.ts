/** What a call in progress knows: when it is to end, whom it tells that it goes on, and what watches over it. */
import { AsyncLocalStorage } from 'node:async_hooks';
import { setMaxListeners } from 'node:events';

export interface CallContext {
  /** Fires when the call is to end before its time. */
  readonly signal: AbortSignal;
  /** Told of signs of life. */
  readonly alive?: ((what: string) => void) | undefined;
  /** `worker.method` of the pool's call that is running; undefined in the controller. */
  readonly running?: string | undefined;
  /** Row of a group's batch with which the part of this rank begins. */
  readonly firstRow?: number | undefined;
  /** Of the calls that end together. */
  readonly supervisor?: Supervisor | undefined;
}

export interface Supervisor {
  /** `answer` settles when the caller need wait no longer. */
  watchOver(answer: Promise<unknown>): void;
}

const contexts = new AsyncLocalStorage<CallContext>();

export function callContext(): CallContext | undefined {
  return contexts.getStore();
}

export function inContext<T>(context: CallContext, work: () => T): T {
  return contexts.run(context, work);
}

/**
 * For workers and reward functions: fires when the call is to end, because another rank or another call of the iteration has failed
 * or the run is cancelled. Undefined outside of a call.
 */
export function callSignal(): AbortSignal | undefined {
  return contexts.getStore()?.signal;
}

/** For workers: tells the pool that the call goes on, also from callbacks. Takes what has happened, such as `token 12`. */
export function callProgress(): (what: string) => void {
  return contexts.getStore()?.alive ?? (() => undefined);
}

/** For workers whose answers depend on where a row stands in the batch: the row with which their part begins; 0 outside of a group. */
export function callFirstRow(): number {
  return contexts.getStore()?.firstRow ?? 0;
}

/** For any number of calls that listen; more than ten are no leak here. */
export function releaseController(): AbortController {
  const controller = new AbortController();
  setMaxListeners(0, controller.signal);
  return controller;
}

/** A signal that fires with the first of several, until `unlink`. */
export function linkedSignal(sources: readonly (AbortSignal | undefined)[]): {
  signal: AbortSignal;
  unlink: () => void;
} {
  const controller = releaseController();
  const links = sources.flatMap((source) => (source ? [forwardAbort(source, controller)] : []));
  const unlink = (): void => {
    for (const link of links) link();
  };
  return { signal: controller.signal, unlink };
}

/** Aborts the controller with the source's reason, now or later; the result ends that. */
export function forwardAbort(source: AbortSignal, controller: AbortController): () => void {
  const abort = (): void => controller.abort(source.reason);
  if (source.aborted) abort();
  else source.addEventListener('abort', abort, { once: true });
  return () => source.removeEventListener('abort', abort);
}

/** The promise's outcome, or at once the signal's reason when that fires first. */
export function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    const abort = (): void => reject(signal.reason);
    const done = (): void => signal.removeEventListener('abort', abort);
    if (signal.aborted) abort();
    else signal.addEventListener('abort', abort, { once: true });
    promise.then(resolve, reject).finally(done);
  });
}
