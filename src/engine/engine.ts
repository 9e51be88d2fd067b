/**
 * One rank's model: packed token sequences in, per-token scalars out, per-token gradients back (DESIGN §1.2). The engine
 * knows no algorithm; algorithms know no weight, shard or device.
 *
 * Per-token arrays are packed without padding, in the order of `TokenBatch.tokens`. Position t of a sequence carries the
 * prediction made after reading tokens 0..t: `logprobs[t]` = log p(token t+1 | tokens 0..t) (0 at the last position, which
 * predicts nothing), `entropies[t]` of that distribution, `values[t]` of the state after token t.
 */
import type { TokenBatch } from '../data/batch.js';
import type { ModelShape } from '../layout/model-shape.js';
import type { ModelState } from './model-state.js';
import type { TransitionReport } from './transition.js';

export type Dtype = 'float32' | 'bfloat16';

/** What a forward pass returns. `values` needs a value or score head, the others a language-model head. */
export type ForwardOutput = 'logprobs' | 'entropies' | 'values' | 'logits' | 'hidden';

export interface ForwardOptions {
  outputs: readonly ForwardOutput[];
  /** Logits are divided by it before log-softmax; default 1. */
  temperature?: number;
  /** Keeps activations for `backward`; needs an engine created with `train`. Default false. */
  keep?: boolean;
}

export interface ForwardResult {
  /** [T] */ logprobs?: Float32Array;
  /** [T] */ entropies?: Float32Array;
  /** [T] of the value or score head */ values?: Float32Array;
  /** [T, V] (tests and small models only) */ logits?: Float32Array;
  /** [T, D] after the final norm, as the heads read it */ hidden?: Float32Array;
}

/** dLoss/d(output) per token, [T]; an absent one is zero. */
export interface TokenGradients {
  logprobs?: Float32Array;
  entropies?: Float32Array;
  values?: Float32Array;
}

/** Micro-batches of one optimizer step: of each data-parallel replica its own, in the order of their rows. */
export type MicroBatches = readonly (readonly TokenBatch[])[];

/**
 * What a loss makes of the outputs of micro-batch `index` of a replica. Called once for each, in no fixed order of replicas.
 */
export type GradientsOf = (outputs: ForwardResult, replica: number, index: number) => TokenGradients;

export interface AccumulateOptions extends Omit<ForwardOptions, 'keep'> {
  /**
   * No other micro-batch of the step follows, so that replicas reduce gradients while backward goes on. Default true; of
   * several calls before one step all but the last say false.
   */
  final?: boolean;
}

/** AdamW (Loshchilov & Hutter 2019), decoupled decay on matrices only, after clipping to `clipNorm` (0: no clipping). */
export interface StepOptions {
  learningRate: number;
  betas: readonly [number, number];
  epsilon: number;
  weightDecay: number;
  clipNorm: number;
  /** 1 for the first update: bias correction. */
  step: number;
}

export interface StepResult {
  /** l2 norm over all parameters, before clipping. */
  gradientNorm: number;
}

export interface SamplingOptions {
  maxNewTokens: number;
  /** 0 is greedy. */
  temperature: number;
  /** 1: off */ topP: number;
  /** 0: off */ topK: number;
  /** Token ids that end a sequence; the id is part of the output. */
  stopTokens: readonly number[];
  seed: number | bigint;
  /**
   * Tokens that are guessed for a sequence and step where few sequences run, at most; 0, the default, turns it off. Guesses are
   * what followed the same tokens before; texts and log-probs are the same bits without them.
   */
  speculation?: number;
}

export interface GenerateRequest {
  prompt: Int32Array;
  /** Counter of the random stream: the text is a function of (weights, prompt, settings, seed, id) only. */
  id: number | bigint;
  /** Overrides `SamplingOptions.maxNewTokens` for this request. */
  maxNewTokens?: number;
}

export interface Generated {
  /** New tokens, the stop token included. */
  tokens: Int32Array;
  /** log p of each new token under the model's own distribution at the sampling temperature (1 when it is 0). */
  logprobs: Float32Array;
  finish: 'stop' | 'length' | 'aborted';
}

/** New tokens of some requests, in batches: never one crossing a token. */
export interface GenerateProgress {
  /** Index into the requests, one entry a token. */
  requests: Int32Array;
  tokens: Int32Array;
  /** Tokens so far, over all requests. */
  total: number;
}

/** Tokens that were guessed (`speculation`), and those of them that were what the model sampled. */
export interface Guesses {
  guessed: number;
  accepted: number;
}

export interface GenerateOptions extends SamplingOptions {
  signal?: AbortSignal;
  /** Called on the JavaScript thread; return indices of requests to end now (a stop string was seen). */
  onProgress?: (progress: GenerateProgress) => readonly number[] | undefined;
  /** With `speculation`: called at the end, once for every replica that had requests. */
  onGuesses?: (guesses: Guesses) => void;
}

/** Which copy of the parameters a state access means. */
export type ParameterSpace = 'weights' | 'moment1' | 'moment2' | 'gradients';

export type StoredDtype = 'F32' | 'BF16' | 'F16';

/** A whole Hugging Face tensor in a file, row-major, from byte `offset`. */
export interface FileTensor {
  name: string;
  space: Exclude<ParameterSpace, 'gradients'>;
  file: string;
  offset: number;
  dtype: StoredDtype;
}

/** A save on its way. */
export interface Saving {
  /** Host memory that the copy takes until everything is written; 0 without one. */
  copiedBytes: number;
  /** Resolves when everything is written. A caller that comes to it later need not fear an unhandled rejection. */
  written: Promise<void>;
}

export interface EngineMemory {
  /** Bytes planned and largest bytes used, per arena. */
  readonly [arena: string]: { planned: number; highWater: number };
}

export interface Engine extends AsyncDisposable {
  readonly shape: ModelShape;
  readonly dtype: Dtype;
  readonly parts: number;
  /** Data-parallel degree: replicas of the model that learn together. */
  readonly replicas: number;
  /**
   * Called after each way to the generation layout of a model that has one.
   * @internal
   */
  onTransition?: ((report: TransitionReport) => void) | undefined;
  /**
   * The state of each rank, for `moveState`; absent when it stays where it is.
   * @internal
   */
  readonly states?: readonly ModelState[];

  forward(batch: TokenBatch, options: ForwardOptions): Promise<ForwardResult>;
  /** The same of each batch, without keeping: all are under way together, so that no stage of a pipeline waits for one's end. */
  forwardEach(batches: readonly TokenBatch[], options: Omit<ForwardOptions, 'keep'>): Promise<ForwardResult[]>;
  /** Adds the gradients of the last `forward` with `keep` to the accumulators, and releases its activations. */
  backward(gradients: TokenGradients): Promise<void>;
  /**
   * Forward and backward of micro-batches, with as many under way at the same time as the layout asks for. When it fails, no
   * gradient is left in the accumulators; what `gradientsOf` throws is thrown on.
   * @throws LockstepError GRADIENTS_REDUCED by replicas after a call that was `final`, until the step
   */
  accumulate(microBatches: MicroBatches, options: AccumulateOptions, gradientsOf: GradientsOf): Promise<void>;
  /** Clips, updates, publishes the compute weights and clears the gradients. */
  step(options: StepOptions): Promise<StepResult>;
  generate(requests: readonly GenerateRequest[], options: GenerateOptions): Promise<Generated[]>;

  /** One Hugging Face tensor as float32, row-major, unpacked. */
  readTensor(name: string, space?: ParameterSpace): Promise<Float32Array>;
  /** The inverse of `readTensor`. After the last one, `publish` renews the compute weights. */
  writeTensor(name: string, data: Float32Array, space?: ParameterSpace): Promise<void>;
  publish(): Promise<void>;

  /**
   * Reads tensors from files, on all ranks at the same time, and publishes the compute weights.
   * @throws LockstepError CHECKPOINT_UNREADABLE, CHECKPOINT_CORRUPT, CHECKPOINT_NOT_FINITE, MODEL_NOT_TRAINED
   */
  load(tensors: readonly FileTensor[]): Promise<void>;
  /**
   * Writes tensors in float32 into files that have their full length, on all ranks at the same time. Resolves when the model may
   * change: with `copy` once its state is copied into host memory, from which threads beside the ranks' write, else at the end.
   * @throws LockstepError CHECKPOINT_WRITE_FAILED with path and cause (`written` too), OUT_OF_MEMORY, MODEL_NOT_TRAINED
   */
  save(tensors: readonly FileTensor[], options?: { copy?: boolean }): Promise<Saving>;

  memory(): EngineMemory;
  close(): Promise<void>;
}
