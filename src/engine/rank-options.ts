/** What an engine of one rank is made of. */
import type { WeightPlace } from '../layout/generation-view.js';
import type { ModelShape } from '../layout/model-shape.js';
import type { Degrees } from '../layout/parallel.js';
import type { Range } from '../layout/stages.js';
import type { Device } from './device.js';
import type { Dtype } from './engine.js';
import type { NativeMemory, NativeWorld } from './native.js';

export interface EngineOptions {
  shape: ModelShape;
  device: Device;
  dtype: Dtype;
  /** Gradients, moments and masters are held too. Default false. */
  train?: boolean;
  /** numerics.parts; default: the rule of DESIGN §2. */
  parts?: number | 'auto';
  /** Layers keep only their input for backward and are computed again. Default false. */
  recompute?: boolean;
  /** One of several ranks, which ParallelEngine makes work together. Default: alone. */
  rank?: RankOfWorld;
  /** Of ranks with replicas: ZeRO stage (layout/zero.ts), default 0. */
  zero?: number;
  /** Default: an arena of its own. */
  weights?: WeightsIn;
  /** Bytes of gradients that are reduced together. Default: `defaultBucketBytes`. */
  bucketBytes?: number;
  /** What replicas exchange goes on behind the computation. Default true. */
  overlap?: boolean;
}

/** Compute weights in a memory that others use too; its owner counts its bytes in the device's budget. */
export interface WeightsIn {
  memory: NativeMemory;
  /** One per tensor of the engine's table. */
  places: readonly WeightPlace[];
}

export interface RankOfWorld {
  degrees: Degrees;
  rank: number;
  world: NativeWorld;
  /** Layers of each stage; default: those of `stageLayers`. */
  stages?: readonly Range[];
}
