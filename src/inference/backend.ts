/** What runs models: a device and engines on it, loaded from checkpoints. Tests put a table in its place. */
import type { Checkpoint } from '../checkpoints/hugging-face.js';
import type { Dtype, Engine } from '../engine/engine.js';
import type { Head } from '../layout/model-shape.js';

export interface DeviceSettings {
  threads: number;
  /** Budget of everything the device holds. */
  memoryBytes: number;
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
  async openDevice(settings) {
    const { createDevice, createEngine } = await import('../checkpoints/load-model.js');
    const device = createDevice(settings);
    return {
      createEngine: (checkpoint, options) => createEngine({ ...options, model: checkpoint, device }),
      close: () => device.close(),
    };
  },
};
