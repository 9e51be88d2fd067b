/**
 * The one file that types the addon and the one that loads it. Names are those of native/binding; arrays cross as typed
 * arrays, long work as promises.
 */
import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { LockstepError } from '../errors.js';
import { type CallPlan, cpuLogits, gpuLogits, type LogitBlock } from '../layout/memory-plan.js';
import type { StateGroup } from '../layout/rotation.js';
import type {
  FileTensor,
  ForwardOutput,
  ForwardResult,
  Generated,
  GenerateProgress,
  Guesses,
  ParameterSpace,
  TokenGradients,
} from './engine.js';

/** What a stream of the rank's GPU did for a call, as the GPU measured it; in seconds of the clock of process.hrtime(). */
export interface StreamWork {
  gpu: number;
  stream: 'compute' | 'to host' | 'from host';
  begin: number;
  end: number;
  /** Of that time: while the host has its turns within a call, as between the tokens that it takes, the stream is idle. */
  busy: number;
  /** Of a copy. */
  bytes: number;
}

/** When the rank's thread ran a call, in seconds; begin and end are of the clock of process.hrtime(). */
export interface WorkTimes {
  /** When its input was there: what a stage of a pipeline waits for the one before, or after, lies before. */
  begin: number;
  /** Before its output is handed on to another stage. */
  end: number;
  /** In calls of communicators, waits included. */
  communicating: number;
  /** In those, for ranks that had not come yet. */
  waiting: number;
  /** On a GPU: one for the call's computations, and one for each copy between the host and what lies in arenas. */
  streams?: StreamWork[];
}

/** How every call of a rank resolves. */
export interface Timed<T> extends WorkTimes {
  value: T;
}

export interface NativeDevice {
  /** "reference", "avx2", "avx512", "avx512-bf16" or "cuda". */
  readonly kernels: string;
  /** Sequences of a micro-batch start at multiples of so many rows. */
  readonly rowGrain: number;
  memory(): Record<'workspace' | 'scratch', { planned: number; highWater: number }>;
  /** Bytes of the arenas of models and the workspace, and of what was moved to host memory. */
  spaces(): Record<'device' | 'host', { used: number; highWater: number }>;
  /** One exchange on the transfer thread, after the calls made so far and before later ones; first the workspace gives back what it has beyond `workspaceBytes`. */
  move(call: {
    moves: NativeMove[];
    chunkBytes: number;
    folder: string;
    workspaceBytes?: number;
  }): Promise<Timed<void>>;
  /** What the workspace has beyond so many bytes goes back to the system. */
  limitWorkspace(bytes: number): Promise<Timed<void>>;
  close(): void;
  /** Times one operation beside its ceiling, verified first (bench/). */
  bench(call: NativeBench): Promise<Timed<NativeBenchResult>>;
}

export type NativeBench = { runs: number; ceilingBytes?: number } & (
  | {
      what: 'gemm';
      product: 'forward' | 'input' | 'weight';
      rows: number;
      out: number;
      in: number;
      split: 'none' | 'out' | 'in';
      parts: number;
      dtype: 'float32' | 'bfloat16';
      /** Weights that no cache holds; the ceiling is then reading memory, else multiply-adds. */
      cold: boolean;
    }
  /** Causal, over packed sequences of one length; the ceiling is multiply-adds. */
  | {
      what: 'attention';
      backward: boolean;
      sequences: number;
      length: number;
      heads: number;
      keyValueHeads: number;
      headWidth: number;
      parts: number;
      dtype: 'float32' | 'bfloat16';
    }
  | { what: 'adamw'; count: number }
  | { what: 'dispatch' }
  | { what: 'ceilings'; dtype: 'float32' | 'bfloat16' }
  /** Pinned host memory to the device and back; work is both. */
  | { what: 'moves'; bytes: number }
  /** In place, among ranks of a thread each; the ceiling is memcpy by as many threads. Work is bytes of one rank. */
  | { what: 'collective'; operation: 'all-gather' | 'reduce-scatter' | 'all-reduce'; ranks: number; bytes: number }
);

/** Seconds of each run, and the multiply-adds or bytes that one run of the operation and of the ceiling makes. */
export interface NativeBenchResult {
  seconds: number[];
  ceilingSeconds: number[];
  work: number;
  ceilingWork: number;
  verified: boolean;
}

/** ForwardCall of native/model/model.h. */
export interface NativeForward {
  passes: NativePass[];
  units: CallPlan;
  workspaceBytes: number;
  inverseTemperature: number;
  keep?: { first: boolean; more: boolean };
  outputs: Partial<Record<ForwardOutput, true>>;
}

/** One micro-batch, and where its activations stay. */
export interface NativePass {
  tokens: Int32Array;
  lengths: Int32Array;
  plan: CallPlan;
  slot: number;
}

export interface NativeBackward {
  passes: readonly KeptGradients[];
  more: boolean;
  last: boolean;
}

/** Of the forward kept in a slot. */
export interface KeptGradients extends TokenGradients {
  slot: number;
}

/** Bytes from and to other ranks. */
export interface NativeTraffic {
  receivedBytes: number;
  sentBytes: number;
}

/** Of a model over ranks (Degrees of native/model/parallel.h). */
export interface NativeDegrees {
  pipeline: number;
  tensor: number;
  data: number;
  keyValueRanks: number;
  tiedEnds: boolean;
}

export interface NativeGenerate {
  plan: CallPlan;
  units: CallPlan;
  temperature: number;
  topP: number;
  topK: number;
  stopTokens: Int32Array;
  seed: bigint;
  rows: number;
  sequences: number;
  guesses: number;
  guessRows: number;
  pages: number;
  requests: { prompt: Int32Array; maxNewTokens: number; id: bigint }[];
}

/** How one generation went. */
export interface GenerationStatistics extends Guesses {
  /** Forward passes, rows in them, sequences sent back for want of pages, positions taken over from a shared prompt. */
  steps: number;
  rows: number;
  preemptions: number;
  sharedPositions: number;
}

export interface NativeGenerated extends GenerationStatistics {
  results: Generated[];
}

/** Flat quadruples: source row, tensor index, row in that tensor, count. */
export type NativePieces = number[];

/** A rank's part of a tensor in a file: these rows, and of them these columns. */
export interface NativeSlice extends FileTensor {
  /** Logical shape [out rows, in columns]; a transposed one is stored [columns, rows]. */
  rows: number;
  columns: number;
  columnBegin: number;
  columnCount: number;
  transposed: boolean;
  pieces: NativePieces;
}

/** A model's state in host memory; `save` takes `copy` once. */
export interface NativeSnapshot {
  bytes: number;
  copy: object;
}

export interface NativeStep {
  learningRate: number;
  beta1: number;
  beta2: number;
  epsilon: number;
  weightDecay: number;
  clipNorm: number;
  step: number;
}

export interface NativeMove {
  model: NativeModel;
  group: StateGroup;
  place: NativeStateGroup['place'];
}

/** Where a group is, and what moving it has cost so far. */
export interface NativeStateGroup {
  place: 'device' | 'host' | 'file' | 'dropped';
  absentBytes: number;
  offloadBytes: number;
  restoreBytes: number;
  droppedBytes: number;
  offloadSeconds: number;
  restoreSeconds: number;
}

/** Ranks of this process that communicate; each model of several ranks takes one handle. */
export interface NativeWorld {
  readonly __world?: never;
}

/** An arena by itself, which models and transfers of a rank share. */
export interface NativeMemory {
  /** Bytes reserved, largest end used, and bytes of whole pages that the system keeps in memory now. */
  marks(): { planned: number; highWater: number; resident: number };
  /** Pairs of offset and bytes, given back to the system on the device's thread: they read as zeros afterwards. */
  discard(device: NativeDevice, ranges: number[]): Promise<Timed<void>>;
  /** Tests and benches. */
  read(offset: number, bytes: number): Uint8Array;
  write(offset: number, data: Uint8Array): void;
  close(): void;
}

/** One rank's part of a list of slices between the memories of a group (native/transfer/slices.h). */
export interface NativeTransferOptions {
  source: NativeMemory;
  destination: NativeMemory;
  /** Absent: a group of one. */
  group?: { world: NativeWorld; rank: number };
  /** Global ranks of the group, for messages. */
  ranks: number[];
  tensors: string[];
  /** Flat: tensor, from, to (ranks of the group), source offset, destination offset, bytes, runs, and their distances on both sides. */
  slices: number[];
}

export interface NativeTransferResult {
  receivedBytes: number;
  sentBytes: number;
  moveSeconds: number;
  checkSeconds: number;
}

export interface NativeTransfer {
  /** It runs as one all-gather. */
  readonly gathers: boolean;
  /** All ranks of the group together; `check` sums what is sent and what arrives. */
  run(check: boolean): Promise<Timed<NativeTransferResult>>;
  /** Rejects when what the last checked run sent has changed since. */
  verify(): Promise<Timed<void>>;
  close(): void;
}

export interface NativeModel {
  /** Resolves when all ranks of the world have called it. */
  join(degrees: NativeDegrees): Promise<Timed<void>>;
  load(slices: NativeSlice[]): Promise<Timed<void>>;
  snapshot(slices: NativeSlice[]): Promise<Timed<NativeSnapshot>>;
  save(slices: NativeSlice[], copy?: object): Promise<Timed<void>>;
  /** Of each pass. */
  forward(call: NativeForward): Promise<Timed<ForwardResult[]>>;
  backward(call: NativeBackward): Promise<Timed<void>>;
  step(options: NativeStep): Promise<Timed<number>>;
  generate(
    call: NativeGenerate,
    onProgress?: (progress: GenerateProgress) => number[] | undefined,
  ): { promise: Promise<Timed<NativeGenerated>>; abort(): void };
  readRows(call: { space: ParameterSpace; columns: number; pieces: NativePieces }): Promise<Timed<Float32Array>>;
  writeRows(call: {
    space: ParameterSpace;
    columns: number;
    pieces: NativePieces;
    data: Float32Array;
  }): Promise<Timed<void>>;
  reduceGradients(): Promise<Timed<void>>;
  clearGradients(): Promise<Timed<void>>;
  publish(): Promise<Timed<void>>;
  traffic(): NativeTraffic;
  state(): Record<StateGroup, NativeStateGroup>;
  memory(): Record<'weights' | 'gradients' | 'optimizer', { planned: number; highWater: number }>;
  close(): void;
}

export interface NativeAddon {
  Device: new (options: {
    threads: number;
    scratchBytes: number;
    implementation: 'cpu' | 'reference' | 'cuda';
    isa: string;
    gpu: number;
    poison: boolean;
    hostBytes: number;
  }) => NativeDevice;
  World: new (options: { ranks: number; timeoutSeconds: number }) => NativeWorld;
  Model: new (
    device: NativeDevice,
    spec: object,
    ranks?: { world: NativeWorld; rank: number },
    weights?: NativeMemory,
  ) => NativeModel;
  Memory: new (options: { name: string; bytes: number; device: NativeDevice }) => NativeMemory;
  Transfer: new (device: NativeDevice, options: NativeTransferOptions) => NativeTransfer;
  /** The kernels that a name ('' for the best) resolves to on this CPU, after their self-check. */
  instructionSet(name: string): string;
  /** What the addon can do with GPUs here; never throws. */
  cuda(): CudaStatus;
  /** Of a GPU what nobody uses, and all that it has; throws what a Device on it would. */
  gpuMemory(gpu: number): { freeBytes: number; totalBytes: number };
}

export interface CudaStatus {
  build: 'none' | 'hardware' | 'emulated';
  /** Why no GPU can be used, and what to do; empty when one can. */
  problem: string;
  /** CUDA versions, 1000 major + 10 minor; 0: there is none. */
  driver: number;
  runtime: number;
  gpus: { name: string; major: number; minor: number; multiprocessors: number; memoryBytes: number }[];
}

const root = join(dirname(fileURLToPath(import.meta.url)), '..', '..');

/** Where the addon is looked for, in order. */
export function nativePaths(): string[] {
  const explicit = process.env.LOCKSTEP_NATIVE_PATH;
  // Built with the tests only.
  if (environmentDevice() === 'cuda-emulated' && !explicit) {
    return [join(root, 'build', 'Release', 'lockstep_emulated.node')];
  }
  return [
    ...(explicit ? [explicit] : []),
    join(root, 'prebuilds', `${process.platform}-${process.arch}`, 'lockstep.node'),
    join(root, 'build', 'Release', 'lockstep.node'),
    join(root, 'build', 'Debug', 'lockstep.node'),
  ];
}

let loaded: { addon: NativeAddon; path: string } | undefined;

/**
 * Loads the addon once.
 *
 * @throws LockstepError NATIVE_NOT_BUILT with every path tried and the command that builds it; NATIVE_UNLOADABLE when a
 *   file is there but cannot be loaded; PLATFORM_UNSUPPORTED elsewhere than on Linux x86-64.
 */
export function loadNative(): NativeAddon {
  return nativeLocation().addon;
}

/** The loaded addon and its path. */
export function nativeLocation(): { addon: NativeAddon; path: string } {
  if (loaded) return loaded;
  if (process.platform !== 'linux' || process.arch !== 'x64') {
    throw new LockstepError(
      'PLATFORM_UNSUPPORTED',
      `Lockstep runs on Linux x86-64 with AVX2 and FMA; this is ${process.platform} ${process.arch}.`,
    );
  }
  const tried = nativePaths();
  const path = tried.find((candidate) => existsSync(candidate));
  if (path === undefined) {
    throw new LockstepError(
      'NATIVE_NOT_BUILT',
      `The native addon is not built. Looked for:\n${tried.map((p) => `  ${p}`).join('\n')}\nBuild it with: node ${join(root, 'scripts', 'build-native.mjs')}`,
      { tried },
    );
  }
  try {
    loaded = { addon: createRequire(import.meta.url)(path) as NativeAddon, path };
  } catch (cause) {
    throw new LockstepError(
      'NATIVE_UNLOADABLE',
      `${path} cannot be loaded: ${(cause as Error).message}. Build it anew with: node ${join(root, 'scripts', 'build-native.mjs')}`,
      { path },
      { cause },
    );
  }
  return loaded;
}

/** What computes: a CPU, or a GPU with CUDA. */
export type Processor = 'cpu' | 'cuda';

/**
 * LOCKSTEP_DEVICE, '' when it is not set.
 *
 * @throws LockstepError DEVICE_INVALID for an unknown name.
 */
function environmentDevice(): '' | Processor | 'cuda-emulated' {
  const device = process.env.LOCKSTEP_DEVICE ?? '';
  if (device === '' || device === 'cpu' || device === 'cuda' || device === 'cuda-emulated') return device;
  throw new LockstepError(
    'DEVICE_INVALID',
    `LOCKSTEP_DEVICE is '${device}'; expected cpu, cuda or, for tests, cuda-emulated (unset: a GPU where there is one).`,
    { received: device },
  );
}

/**
 * What `auto` stands for: LOCKSTEP_DEVICE where it is set, else a GPU where the addon can use one.
 *
 * @throws LockstepError DEVICE_INVALID, and what `loadNative` throws.
 */
export function resolveProcessor(asked: 'auto' | Processor = 'auto'): Processor {
  if (asked !== 'auto') return asked;
  const environment = environmentDevice();
  if (environment !== '') return environment === 'cpu' ? 'cpu' : 'cuda';
  const { build, problem } = loadNative().cuda();
  return build === 'hardware' && problem === '' ? 'cuda' : 'cpu';
}

/** Rows at whose multiples sequences start on it (kernels.h). */
export const rowGrainOf = (asked: 'auto' | Processor = 'auto'): number => (resolveProcessor(asked) === 'cuda' ? 16 : 2);
/** How many rows of logits it computes at a time. */
export const logitBlockOf = (asked: 'auto' | Processor = 'auto'): LogitBlock =>
  resolveProcessor(asked) === 'cuda' ? gpuLogits : cpuLogits;

/**
 * The instruction set asked for by LOCKSTEP_ISA, '' when it is not set.
 *
 * @throws LockstepError ISA_INVALID for an unknown name.
 */
export function requestedInstructionSet(): string {
  const isa = process.env.LOCKSTEP_ISA ?? '';
  if (isa !== '' && !['avx2', 'avx512', 'avx512-bf16'].includes(isa)) {
    throw new LockstepError(
      'ISA_INVALID',
      `LOCKSTEP_ISA is '${isa}'; expected avx2, avx512 or avx512-bf16 (unset: the best one that the CPU has).`,
      { isa },
    );
  }
  return isa;
}
