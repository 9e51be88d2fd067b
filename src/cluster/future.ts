/**
 * The handle to a call's answer (HybridFlow [2409.19256], figure 5): the controller passes it on to the calls that need the data,
 * which take it from where it lies; only who awaits it has the data in the controller's hands.
 */
import { Shards } from './rows.js';

/** An answer whose data came to the controller. */
export interface Materialised {
  /** `worker.method` of the call that gave it. */
  readonly label: string;
  /** Of the typed arrays in it. */
  readonly bytes: number;
}

/**
 * Awaiting it materialises the answer: what lies in parts is joined, and the observer is told, once. Passing it to another call
 * does neither. A failure that nobody awaits is no unhandled rejection; it fails the calls that depend on it, and the iteration
 * (`supervise`).
 */
export class Future<T> implements Promise<T> {
  readonly [Symbol.toStringTag] = 'Future';
  readonly #held: Promise<unknown>;
  readonly #whole: (held: unknown) => T;
  #value: Promise<T> | undefined;

  /** `held` is the answer as it lies. */
  constructor(
    readonly label: string,
    held: Promise<unknown>,
    { whole = wholeOf, onMaterialise }: FutureOptions = {},
  ) {
    held.catch(() => undefined);
    this.#held = held;
    this.#whole = (parts) => {
      const value = whole(parts) as T;
      onMaterialise?.({ label, bytes: bytesOf(value) });
      return value;
    };
  }

  /** The answer as it lies, a batch of a group perhaps in parts (`Shards`). */
  get held(): Promise<unknown> {
    return this.#held;
  }

  // biome-ignore lint/suspicious/noThenProperty: it is a promise
  then<A = T, B = never>(
    fulfilled?: ((value: T) => A | PromiseLike<A>) | null,
    rejected?: ((reason: unknown) => B | PromiseLike<B>) | null,
  ): Promise<A | B> {
    this.#value ??= this.#held.then(this.#whole);
    return this.#value.then(fulfilled, rejected);
  }

  catch<B = never>(rejected?: ((reason: unknown) => B | PromiseLike<B>) | null): Promise<T | B> {
    return this.then(undefined, rejected);
  }

  finally(ended?: (() => void) | null): Promise<T> {
    return this.then().finally(ended);
  }
}

export interface FutureOptions {
  /** Makes one value of an answer in parts. Default: joins them. */
  readonly whole?: (held: unknown) => unknown;
  readonly onMaterialise?: ((what: Materialised) => void) | undefined;
}

/** An argument as it lies: of a future without materialising it, of another promise its value. */
export async function heldOf(argument: unknown): Promise<unknown> {
  return argument instanceof Future ? argument.held : argument;
}

/** A batch in parts as one. Errors: `BATCH_INVALID`. */
export function wholeOf(held: unknown): unknown {
  return held instanceof Shards ? held.join() : held;
}

/** Of typed arrays: the value itself, or in the fields and entries of objects and lists. */
function bytesOf(value: unknown): number {
  if (ArrayBuffer.isView(value)) return value.byteLength;
  if (typeof value !== 'object' || value === null) return 0;
  return Object.values(value).reduce((sum: number, field) => sum + bytesOf(field), 0);
}
