/** What runs models: a device and engines on it, loaded from checkpoints. Tests put a table in its place. */
import type { Checkpoint } from '../checkpoints/hugging-face.js';
import type { Dtype, Engine } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import type { Head } from '../layout/model-shape.js';

export interface DeviceSettings {
  threads: number;
  /** Budget of everything the device holds. */
  memoryBytes: number;
  /** Budget of state that is moved to host memory, and where it is moved to files; defaults: those of `Device`. */
  hostBytes?: number;
  offloadFolder?: string;
  /** Stages of the pipeline, and ranks that share each: a model runs on their product. Default 1. */
  pipeline?: number;
  tensor?: number;
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
  async openDevice({ pipeline = 1, tensor = 1, ...settings }) {
    const { createDevice, createEngine } = await import('../checkpoints/load-model.js');
    if (pipeline * tensor > 1) return openRanks({ pipeline, tensor }, settings);
    const device = createDevice(settings);
    return {
      createEngine: (checkpoint, options) => createEngine({ ...options, model: checkpoint, device }),
      close: () => device.close(),
    };
  },
};

/** A device for each rank, with its share of the threads, at least one, and the whole budget of memory. */
async function openRanks(
  degrees: { pipeline: number; tensor: number },
  { threads, ...memory }: DeviceSettings,
): Promise<BackendDevice> {
  const { createDevice, createParallelEngine } = await import('../checkpoints/load-model.js');
  const ranks = degrees.pipeline * degrees.tensor;
  const devices = Array.from({ length: ranks }, (_, rank) =>
    createDevice({ threads: Math.max(1, Math.floor((threads + ranks - 1 - rank) / ranks)), ...memory }),
  );
  return {
    createEngine: (checkpoint, { head, dtype, parts, train }) => {
      if (train) {
        const message = `A model is trained on one rank in this version; pipeline ${degrees.pipeline} x tensor ${degrees.tensor} only scores and generates.`;
        throw new LockstepError('RANKS_UNSUPPORTED', message, { ...degrees });
      }
      const given = { ...(head === undefined ? {} : { head }), ...(parts === undefined ? {} : { parts }) };
      return createParallelEngine({ model: checkpoint, devices, degrees, dtype, ...given });
    },
    close: async () => {
      for (const device of devices) await device.close();
    },
  };
}
