/** One rank's device: its threads, kernels and the workspace that its models use in turn. */
import { availableParallelism } from 'node:os';
import { type ErrorDetails, LockstepError } from '../errors.js';
import type { LogitBlock } from '../layout/memory-plan.js';
import {
  loadNative,
  logitBlockOf,
  type NativeDevice,
  type Processor,
  requestedInstructionSet,
  resolveProcessor,
  type Timed,
  type WorkTimes,
} from './native.js';

export interface DeviceOptions {
  /** Threads that compute, the rank's own included; default: the cores there are. */
  threads?: number;
  /** Budget of everything the device holds; default 8 GiB, of a GPU that of `gpuBudget`. */
  memoryBytes?: number;
  /** What sets `memoryBytes`; default: memory.device. */
  limit?: MemoryLimit;
  /** Budget of the state that is moved to host memory; default 16 GiB. */
  hostBytes?: number;
  /** Where state is moved to files; default: the current directory. They have no name while they exist. */
  offloadFolder?: string;
  /** Default `auto`: a GPU where there is one that the addon can use, else the CPU; LOCKSTEP_DEVICE decides where it is set. */
  processor?: 'auto' | Processor;
  /** Of `cuda`: its number. Default: that of the rank. */
  gpu?: number;
  /** `reference` computes with plain loops on the CPU: the oracle, very slow. */
  implementation?: 'reference';
  /** Tests: freed pages of keys and values are filled with NaN. */
  poison?: boolean;
  /** Tests: rows of logits that are computed at a time; default: those of the processor. */
  logits?: LogitBlock;
  /** Among the ranks of a run: named in `details.rank` of its errors. */
  rank?: number;
  /** Told of every work that it has done, those of a thread in their order. */
  onWork?: (work: Work) => void;
}

/** What a rank did for a model, on its thread unless said otherwise. */
export interface Work extends WorkTimes {
  operation:
    | 'join'
    | 'load'
    | 'save'
    | 'snapshot'
    | 'transition'
    | 'forward'
    | 'backward'
    | 'step'
    | 'reduce'
    | 'generate'
    | 'read'
    | 'write'
    | 'clear'
    | 'publish'
    /** Of state, on a thread beside the rank's. */
    | 'move';
  /** Of a forward or backward: which of the replica's micro-batches, when several ranks accumulate. */
  microBatch?: number;
}

/** What sets a device's budget, and what gives more: the begin of an advice. */
export interface MemoryLimit {
  what: string;
  more: string;
}

export const configLimit: MemoryLimit = { what: 'memory.device', more: 'raise memory.device' };

/** Of what a GPU has free, where nobody says how much: the driver and NCCL take something for themselves. */
const autoShare = 0.9;

/** What each of so many pools may take of a GPU; when `asked` for, all that is free. */
export function gpuBudget(gpu: number, { pools = 1, asked = false } = {}): { memoryBytes: number; limit: MemoryLimit } {
  const free = Math.floor(rethrow(() => loadNative().gpuMemory(gpu)).freeBytes / pools);
  const what = `what GPU ${gpu} has free${pools > 1 ? `, shared by ${pools} pools` : ''}`;
  const more = `end what else uses GPU ${gpu} (nvidia-smi shows it)`;
  if (asked) return { memoryBytes: free, limit: { what, more } };
  return {
    memoryBytes: Math.floor(free * autoShare),
    limit: { what: `${autoShare} of ${what}`, more: `${more}, set memory.device to more of it` },
  };
}

/** Scratch of one thread inside an operation: packed operands and tiles. Touched as far as an operation needs it. */
const scratchBytes = 64 << 20;

export class Device implements AsyncDisposable {
  readonly threads: number;
  readonly memoryBytes: number;
  readonly limit: MemoryLimit;
  readonly offloadFolder: string;
  readonly native: NativeDevice;
  /** How many rows of logits it computes at a time. */
  readonly logits: LogitBlock;
  private readonly held = new Map<object, number>();
  /** Of moves under way: it counts until it has left. */
  private leavingBytes = 0;
  /** The largest workspace that a call has asked for: the native one is never smaller than what it holds. */
  private workspaceSeen = 0;
  private readonly rank: number | undefined;
  private readonly onWork: DeviceOptions['onWork'];
  private closed = false;

  /**
   * @throws LockstepError NATIVE_NOT_BUILT, ISA_UNSUPPORTED, ISA_INVALID, THREADS_INVALID; DEVICE_INVALID; CUDA_UNAVAILABLE,
   *   CUDA_DEVICE and CUDA_ARCHITECTURE where a GPU is asked for that cannot be used.
   */
  constructor(options: DeviceOptions = {}) {
    this.threads = options.threads ?? availableParallelism();
    this.offloadFolder = options.offloadFolder ?? '.';
    this.rank = options.rank;
    this.onWork = options.onWork;
    if (!Number.isInteger(this.threads) || this.threads < 1 || this.threads > 256) {
      throw new LockstepError('THREADS_INVALID', `threads: expected an integer in 1..256, received ${this.threads}.`);
    }
    const implementation = options.implementation ?? resolveProcessor(options.processor);
    const gpu = options.gpu ?? options.rank ?? 0;
    const { memoryBytes = 8 * 2 ** 30, limit = configLimit } =
      options.memoryBytes === undefined && implementation === 'cuda' ? gpuBudget(gpu) : options;
    this.memoryBytes = memoryBytes;
    this.limit = limit;
    this.native = rethrow(
      () =>
        new (loadNative().Device)({
          threads: this.threads,
          scratchBytes,
          implementation,
          isa: requestedInstructionSet(),
          gpu,
          poison: options.poison ?? false,
          hostBytes: options.hostBytes ?? 16 * 2 ** 30,
        }),
    );
    this.logits = options.logits ?? logitBlockOf(implementation === 'cuda' ? 'cuda' : 'cpu');
  }

  /** "reference", "avx2", "avx512", "avx512-bf16" or "cuda". */
  get kernels(): string {
    return this.native.kernels;
  }

  /** Sequences of a micro-batch start at multiples of so many rows (kernels.h). */
  get rowGrain(): number {
    return this.native.rowGrain;
  }

  /** Bytes that the models of this device hold for good. */
  get heldBytes(): number {
    return this.settledBytes + this.leavingBytes;
  }

  private get settledBytes(): number {
    let sum = 0;
    for (const bytes of this.held.values()) sum += bytes;
    return sum;
  }

  /** What is left for the workspace. */
  get workspaceBytes(): number {
    return this.memoryBytes - this.heldBytes;
  }

  private get budget(): string {
    return `the device's ${mebibytes(this.memoryBytes)} (limit: ${this.limit.what})`;
  }

  /** @throws LockstepError MEMORY_BUDGET with the arithmetic. */
  hold(owner: object, bytes: number, what: string): void {
    if (bytes > this.workspaceBytes) {
      throw new LockstepError(
        'MEMORY_BUDGET',
        `${what} takes ${mebibytes(bytes)}, and ${mebibytes(this.heldBytes)} of ${this.budget} are taken; ${this.limit.more}, or use a smaller model.`,
        { bytes, held: this.heldBytes, budget: this.memoryBytes },
      );
    }
    this.held.set(owner, bytes);
  }

  release(owner: object): void {
    this.held.delete(owner);
  }

  /**
   * Books an exchange that ends with `held` bytes for each owner: what comes counts from now on, what leaves until `end`. With
   * `workspaceBytes` the workspace must first give back what it has beyond them.
   * @throws LockstepError MEMORY_BUDGET with the arithmetic
   */
  rehold(held: ReadonlyMap<object, number>): Booking {
    const before = this.settledBytes;
    let after = before;
    for (const [owner, bytes] of held) after += bytes - (this.held.get(owner) ?? 0);
    if (after > this.memoryBytes) {
      throw new LockstepError(
        'MEMORY_BUDGET',
        `Moving state to the device would make its models hold ${mebibytes(after)}, more than ${this.budget}; ` +
          `they hold ${mebibytes(before)}. Move other state away first, or ${this.limit.more}.`,
        { bytes: after - before, held: before, budget: this.memoryBytes },
      );
    }
    for (const [owner, bytes] of held) this.held.set(owner, bytes);
    const leaving = Math.max(0, before - after);
    this.leavingBytes += leaving;
    const end = (): void => {
      this.leavingBytes -= leaving;
    };
    const room = Math.max(0, this.workspaceBytes);
    if (this.workspaceSeen <= room) return { end };
    this.workspaceSeen = room;
    return { workspaceBytes: room, end };
  }

  /** What an owner really holds after an exchange that failed. */
  correct(owner: object, bytes: number): void {
    this.held.set(owner, bytes);
  }

  /** @throws LockstepError MEMORY_BUDGET when a call's buffers do not fit beside the models. */
  requireWorkspace(bytes: number, what: string): void {
    if (bytes <= this.workspaceBytes) {
      this.workspaceSeen = Math.max(this.workspaceSeen, bytes);
      return;
    }
    throw new LockstepError(
      'MEMORY_BUDGET',
      `${what} needs ${mebibytes(bytes)} of workspace, and models hold ${mebibytes(this.heldBytes)} of ${this.budget}; ${this.limit.more}, or lower batch.microTokens.`,
      { bytes, held: this.heldBytes, budget: this.memoryBytes },
    );
  }

  /** Bytes that the arenas of models and the workspace, and what was moved to host memory, hold now and held at most. */
  spaces(): ReturnType<NativeDevice['spaces']> {
    return this.native.spaces();
  }

  /** After a hold: the workspace gives back what it has beyond what is left for it. */
  async shrinkWorkspace(): Promise<void> {
    this.workspaceSeen = Math.min(this.workspaceSeen, this.workspaceBytes);
    await untimed(() => this.native.limitWorkspace(this.workspaceBytes));
  }

  /** Runs a native call of a model, and tells of it. */
  async run<T>(operation: Work['operation'], call: () => Promise<Timed<T>>, microBatch?: number): Promise<T> {
    const { value, ...times } = await rethrowAsync(call, this.rank === undefined ? {} : { rank: this.rank });
    this.onWork?.({ operation, ...(microBatch === undefined ? {} : { microBatch }), ...times });
    return value;
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

/** An exchange of state that was booked: see `Device.rehold`. */
export interface Booking {
  workspaceBytes?: number;
  end(): void;
}

const mebibytes = (bytes: number): string => `${(bytes / 2 ** 20).toFixed(1)} MiB`;

/** Native errors carry a code; here they become the library's own error. */
function toLockstepError(error: unknown, details: ErrorDetails = {}): unknown {
  if (LockstepError.isInstance(error) || !(error instanceof Error)) return error;
  const code = (error as Error & { code?: unknown }).code;
  if (typeof code !== 'string') return error;
  return new LockstepError(code as Uppercase<string>, error.message, details, { cause: error });
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
async function rethrowAsync<T>(run: () => Promise<T>, details: ErrorDetails = {}): Promise<T> {
  try {
    return await run();
  } catch (error) {
    throw toLockstepError(error, details);
  }
}

/** Of a native call of which nobody is told when it ran. */
export async function untimed<T>(call: () => Promise<Timed<T>>): Promise<T> {
  return (await rethrowAsync(call)).value;
}
