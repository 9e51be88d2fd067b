/** One rank's device: its threads, kernels and the workspace that its models use in turn. */
import { availableParallelism } from 'node:os';
import { LockstepError } from '../errors.js';
import { loadNative, type NativeDevice, requestedInstructionSet } from './native.js';

export interface DeviceOptions {
  /** Threads that compute, the rank's own included; default: the cores there are. */
  threads?: number;
  /** Budget of everything the device holds; default 8 GiB. */
  memoryBytes?: number;
  /** `reference` computes with plain loops: the oracle, very slow. */
  implementation?: 'cpu' | 'reference';
  /** Tests: freed pages of keys and values are filled with NaN. */
  poison?: boolean;
}

/** Scratch of one thread inside an operation: packed operands and tiles. Touched as far as an operation needs it. */
const scratchBytes = 64 << 20;

export class Device implements AsyncDisposable {
  readonly threads: number;
  readonly memoryBytes: number;
  readonly native: NativeDevice;
  private readonly held = new Map<object, number>();
  private closed = false;

  /** @throws LockstepError NATIVE_NOT_BUILT, ISA_UNSUPPORTED, ISA_INVALID, THREADS_INVALID. */
  constructor(options: DeviceOptions = {}) {
    this.threads = options.threads ?? availableParallelism();
    this.memoryBytes = options.memoryBytes ?? 8 * 2 ** 30;
    if (!Number.isInteger(this.threads) || this.threads < 1 || this.threads > 256) {
      throw new LockstepError('THREADS_INVALID', `threads: expected an integer in 1..256, received ${this.threads}.`);
    }
    this.native = rethrow(
      () =>
        new (loadNative().Device)({
          threads: this.threads,
          scratchBytes,
          implementation: options.implementation ?? 'cpu',
          isa: requestedInstructionSet(),
          poison: options.poison ?? false,
        }),
    );
  }

  /** "reference", "avx2", "avx512" or "avx512-bf16". */
  get kernels(): string {
    return this.native.kernels;
  }

  /** Bytes that the models of this device hold for good. */
  get heldBytes(): number {
    let sum = 0;
    for (const bytes of this.held.values()) sum += bytes;
    return sum;
  }

  /** What is left for the workspace. */
  get workspaceBytes(): number {
    return this.memoryBytes - this.heldBytes;
  }

  /** @throws LockstepError MEMORY_BUDGET with the arithmetic. */
  hold(owner: object, bytes: number, what: string): void {
    if (bytes > this.workspaceBytes) {
      throw new LockstepError(
        'MEMORY_BUDGET',
        `${what} takes ${mebibytes(bytes)}, and ${mebibytes(this.heldBytes)} of the device's ${mebibytes(this.memoryBytes)} are taken. Raise memory.device or use a smaller model.`,
        { bytes, held: this.heldBytes, budget: this.memoryBytes },
      );
    }
    this.held.set(owner, bytes);
  }

  release(owner: object): void {
    this.held.delete(owner);
  }

  /** @throws LockstepError MEMORY_BUDGET when a call's buffers do not fit beside the models. */
  requireWorkspace(bytes: number, what: string): void {
    if (bytes <= this.workspaceBytes) return;
    throw new LockstepError(
      'MEMORY_BUDGET',
      `${what} needs ${mebibytes(bytes)} of workspace; the device has ${mebibytes(this.memoryBytes)}, of which its models hold ${mebibytes(this.heldBytes)}. Raise memory.device or lower batch.microTokens.`,
      { bytes, held: this.heldBytes, budget: this.memoryBytes },
    );
  }

  memory(): ReturnType<NativeDevice['memory']> {
    return this.native.memory();
  }

  /** Cancels what runs, waits for it and ends the threads. Idempotent. */
  async close(): Promise<void> {
    if (this.closed) return;
    this.closed = true;
    this.native.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

const mebibytes = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(1)} MiB`;

/** Native errors carry a code; here they become the library's own error. */
export function toLockstepError(error: unknown): unknown {
  if (LockstepError.isInstance(error) || !(error instanceof Error)) return error;
  const code = (error as Error & { code?: unknown }).code;
  if (typeof code !== 'string') return error;
  return new LockstepError(code as Uppercase<string>, error.message, {}, { cause: error });
}

export function rethrow<T>(run: () => T): T {
  try {
    return run();
  } catch (error) {
    throw toLockstepError(error);
  }
}

/** A promise that someone comes to later: until then its failure is not an unhandled one. */
export function awaitedLater<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => undefined);
  return promise;
}

/** `run` may throw at once (a closed model) or reject. */
export async function rethrowAsync<T>(run: () => Promise<T>): Promise<T> {
  try {
    return await run();
  } catch (error) {
    throw toLockstepError(error);
  }
}
