/** From a checkpoint folder to a running engine. */
import { Device, type DeviceOptions } from '../engine/device.js';
import type { Dtype, Engine } from '../engine/engine.js';
import { NativeEngine } from '../engine/native-engine.js';
import { ParallelEngine, type ParallelOptions } from '../engine/parallel-engine.js';
import { withHead } from '../layout/config.js';
import type { Head, ModelShape } from '../layout/model-shape.js';
import { type Checkpoint, loadPlan, openCheckpoint } from './hugging-face.js';

export interface LoadModelOptions {
  /** A Hugging Face folder, a hub name in the local cache, or an opened checkpoint. */
  model: string | Checkpoint;
  device: Device;
  dtype: Dtype;
  /** Default: the checkpoint's own. A head that it lacks starts at zero. */
  head?: Head;
  train?: boolean;
  /** numerics.parts; default: what suits the model. */
  parts?: number | 'auto';
  /** Keep only the inputs of layers for backward and compute the rest again. */
  recompute?: boolean;
}

/** One rank's device: its threads and workspace, which the engines on it use in turn. */
export function createDevice(options: DeviceOptions = {}): Device {
  return new Device(options);
}

/**
 * Opens a checkpoint and loads it into a new engine.
 * @throws everything that `openCheckpoint` and `loadPlan` throw; CHECKPOINT_NOT_FINITE; PARTS_INVALID; MEMORY_BUDGET
 */
export async function createEngine(options: LoadModelOptions): Promise<NativeEngine> {
  const checkpoint = typeof options.model === 'string' ? await openCheckpoint(options.model) : options.model;
  const { head, device, dtype, train, parts, recompute } = options;
  const shape = shapeUnder(checkpoint, head);
  const engine = new NativeEngine({
    shape,
    device,
    dtype,
    ...(train === undefined ? {} : { train }),
    ...(parts === undefined ? {} : { parts }),
    ...(recompute === undefined ? {} : { recompute }),
  });
  try {
    await loadWeights(engine, checkpoint);
    return engine;
  } catch (error) {
    await engine.close();
    throw error;
  }
}

export type LoadParallelOptions = Pick<LoadModelOptions, 'model' | 'head'> & Omit<ParallelOptions, 'shape'>;

/**
 * The same over several ranks, each of which reads its part of the files.
 * @throws what `createEngine` throws; PARALLEL_INVALID; RANKS_INVALID
 */
export async function createParallelEngine(options: LoadParallelOptions): Promise<ParallelEngine> {
  const checkpoint = typeof options.model === 'string' ? await openCheckpoint(options.model) : options.model;
  const { head, model: _, ...parallel } = options;
  const engine = await ParallelEngine.create({ ...parallel, shape: shapeUnder(checkpoint, head) });
  try {
    await loadWeights(engine, checkpoint);
    return engine;
  } catch (error) {
    await engine.close();
    throw error;
  }
}

function shapeUnder(checkpoint: Checkpoint, head: Head | undefined): ModelShape {
  return head === undefined || head === checkpoint.shape.head ? checkpoint.shape : withHead(checkpoint.shape, head);
}

/** What a head has that the checkpoint's lacks stays zero. */
async function loadWeights(engine: Engine, checkpoint: Checkpoint): Promise<void> {
  const { tensors } = loadPlan(checkpoint, engine, { newHead: engine.shape !== checkpoint.shape });
  await engine.load(tensors);
}
