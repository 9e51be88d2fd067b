/** From a checkpoint folder to a running engine. */
import { Device, type DeviceOptions } from '../engine/device.js';
import type { Dtype } from '../engine/engine.js';
import type { NativeLoad } from '../engine/native.js';
import { NativeEngine } from '../engine/native-engine.js';
import { ParallelEngine, type ParallelOptions, together } from '../engine/parallel-engine.js';
import { withHead } from '../layout/config.js';
import type { Head, ModelShape } from '../layout/model-shape.js';
import { type Checkpoint, type LoadSlice, loadPlan, openCheckpoint } from './hugging-face.js';

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
    await loadRank(engine, checkpoint);
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
    await together(engine.ranks.map((rank) => loadRank(rank, checkpoint)));
    return engine;
  } catch (error) {
    await engine.close();
    throw error;
  }
}

function shapeUnder(checkpoint: Checkpoint, head: Head | undefined): ModelShape {
  return head === undefined || head === checkpoint.shape.head ? checkpoint.shape : withHead(checkpoint.shape, head);
}

async function loadRank(engine: NativeEngine, checkpoint: Checkpoint): Promise<void> {
  const { slices } = loadPlan(checkpoint, engine.table, { newHead: engine.shape !== checkpoint.shape });
  await engine.load(nativeLoad(slices, new Map(engine.table.map((tensor, index) => [tensor.name, index]))));
}

/** File by file, in the order of their bytes: each is mapped once and read forwards. */
function nativeLoad(slices: readonly LoadSlice[], index: ReadonlyMap<string, number>): NativeLoad[] {
  return [...slices]
    .sort((a, b) => (a.file === b.file ? a.offset - b.offset : a.file < b.file ? -1 : 1))
    .map(({ tensor, pieces, ...slice }) => ({
      ...slice,
      pieces: pieces.flatMap((piece) => [piece.sourceRow, index.get(tensor)!, piece.row, piece.rows]),
    }));
}
