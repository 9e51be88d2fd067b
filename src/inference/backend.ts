/** What runs models: a device and engines on it, loaded from checkpoints. Tests put a table in its place. */
import type { Checkpoint } from '../checkpoints/hugging-face.js';
import type { Dtype, Engine } from '../engine/engine.js';
import type { Head } from '../layout/model-shape.js';
import type { ScheduleName } from '../layout/pipeline-schedule.js';

export interface DeviceSettings {
  threads: number;
  /** Budget of everything that a rank's device holds: ranks of one process are devices of their own, with as much each. */
  memoryBytes: number;
  /** Over which ranks models run. Default: one. */
  layout?: LayoutSettings;
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

export interface EngineSettings {
  /** Default: the checkpoint's. A value or score head that the checkpoint lacks starts at zero. */
  head?: Head;
  dtype: Dtype;
  train: boolean;
  parts?: number | 'auto';
  /** Layers keep only their input for backward and are computed again. */
  recompute?: boolean;
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
    const device = createDevice(settings);
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

/** A device for each rank, with its share of the threads, at least one, and a budget of its own. */
async function openRanks(layout: LayoutSettings, { threads, memoryBytes }: DeviceSettings): Promise<BackendDevice> {
  const { createDevice, createParallelEngine } = await import('../checkpoints/load-model.js');
  const { pipeline = 1, tensor = 1, data = 1, ...how } = layout;
  const ranks = ranksOf(layout);
  const devices = await openEach(ranks, (rank) =>
    createDevice({ threads: Math.max(1, Math.floor((threads + ranks - 1 - rank) / ranks)), memoryBytes }),
  );
  return {
    createEngine: (checkpoint, settings) =>
      createParallelEngine({ model: checkpoint, devices, degrees: { pipeline, tensor, data }, ...how, ...settings }),
    close: async () => {
      for (const device of devices) await device.close();
    },
  };
}
