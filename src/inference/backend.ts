/** What runs models: a device and engines on it, loaded from checkpoints. Tests put a table in its place. */
import type { Checkpoint } from '../checkpoints/hugging-face.js';
import type { DeviceOptions, MemoryLimit, Work } from '../engine/device.js';
import type { Dtype, Engine } from '../engine/engine.js';
import type { TransitionEngine } from '../layout/hybrid-engine.js';
import type { Head } from '../layout/model-shape.js';
import type { ScheduleName } from '../layout/pipeline-schedule.js';

export interface DeviceSettings {
  threads: number;
  /** Default `auto`: GPUs where there are some that can be used, one for each rank, else the CPU. */
  processor?: 'auto' | 'cpu' | 'cuda';
  /** On GPUs that of the first rank, which the others follow. Default 0. */
  firstGpu?: number;
  /** Budget of everything that a rank's device holds: ranks of one process are devices of their own, with as much each. Default: that of `Device`. */
  memoryBytes?: number;
  /** What sets `memoryBytes`; default: memory.device. */
  limit?: MemoryLimit;
  /** Budget of state that is moved to host memory, and where it is moved to files; defaults: those of `Device`. */
  hostBytes?: number;
  offloadFolder?: string;
  /** Over which ranks models run. Default: one. */
  layout?: LayoutSettings;
  /** Told of every work of a rank, each rank's in their order. */
  onWork?: (work: Work, rank: number) => void;
}

/** Ranks of a model: replicas x stages of the pipeline x ranks that share a stage. Degrees are 1 by default. */
export interface LayoutSettings {
  pipeline?: number;
  tensor?: number;
  data?: number;
  /** ZeRO stage. Default 0. */
  zero?: number;
  /** Default 1f1b. */
  schedule?: ScheduleName;
}

/** The layout in which a model over ranks generates; default: the one that it is in. */
export interface GenerationSettings {
  pipeline: number;
  tensor: number;
  transition: TransitionEngine;
}

export interface EngineSettings {
  /** Default: the checkpoint's. A value or score head that the checkpoint lacks starts at zero. */
  head?: Head;
  dtype: Dtype;
  train: boolean;
  parts?: number | 'auto';
  /** Layers keep only their input for backward and are computed again. */
  recompute?: boolean;
  /** For a model over ranks. */
  generation?: GenerationSettings;
}

export interface BackendDevice {
  createEngine(checkpoint: Checkpoint, settings: EngineSettings): Promise<Engine>;
  /** Ends its threads; idempotent. */
  close(): Promise<void>;
}

export interface Backend {
  openDevice(settings: DeviceSettings): Promise<BackendDevice>;
}

/** The native engine; the addon is loaded when a device is opened. */
export const nativeBackend: Backend = {
  async openDevice({ layout = {}, ...settings }) {
    const { createDevice, createEngine } = await import('../checkpoints/load-model.js');
    if (ranksOf(layout) > 1) return openRanks(layout, settings);
    const device = createDevice(deviceOf(settings, 0));
    return {
      createEngine: (checkpoint, options) => createEngine({ ...options, model: checkpoint, device }),
      close: () => device.close(),
    };
  },
};

/** `open(0)` to `open(count - 1)`; when one throws, those before it are closed again. */
export async function openEach<T extends { close(): Promise<void> }>(
  count: number,
  open: (index: number) => T,
): Promise<T[]> {
  const opened: T[] = [];
  try {
    for (let i = 0; i < count; i++) opened.push(open(i));
    return opened;
  } catch (error) {
    for (const each of opened) await each.close();
    throw error;
  }
}

const ranksOf = ({ pipeline = 1, tensor = 1, data = 1 }: LayoutSettings): number => pipeline * tensor * data;

const deviceOf = (
  { onWork, firstGpu = 0, ...settings }: Omit<DeviceSettings, 'layout'>,
  rank: number,
): DeviceOptions => ({
  ...settings,
  rank,
  gpu: firstGpu + rank,
  ...(onWork ? { onWork: (work) => onWork(work, rank) } : {}),
});

/** Threads of the one at `index` among `count` that share them: at least one, and one more for the first where they do not divide. */
export const threadShare = (threads: number, count: number, index: number): number =>
  Math.max(1, Math.floor((threads + count - 1 - index) / count));

/** A device for each rank, with its share of the threads and a budget of its own. */
async function openRanks(layout: LayoutSettings, { threads, ...settings }: DeviceSettings): Promise<BackendDevice> {
  const { createDevice, createParallelEngine } = await import('../checkpoints/load-model.js');
  const { pipeline = 1, tensor = 1, data = 1, ...how } = layout;
  const ranks = ranksOf(layout);
  const devices = await openEach(ranks, (rank) =>
    createDevice(deviceOf({ ...settings, threads: threadShare(threads, ranks, rank) }, rank)),
  );
  return {
    createEngine: (checkpoint, { generation, ...settings }) => {
      const degrees = { pipeline, tensor, data };
      const other = generation && (generation.pipeline !== pipeline || generation.tensor !== tensor);
      const generating = other ? { generation, transition: generation.transition } : {};
      return createParallelEngine({ model: checkpoint, devices, degrees, ...how, ...settings, ...generating });
    },
    close: async () => {
      for (const device of devices) await device.close();
    },
  };
}
