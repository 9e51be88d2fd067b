/** What a training run tells its caller: one union, told apart by `type`. */
import type { Config } from './config.js';

/** One row of metrics.jsonl: `step` and numbers under the names of the metric contract. */
export type MetricsRow = { step: number } & Record<string, number>;

/** One generated text, as kept under rollouts/. `text` fields are absent for a model without tokenizer files. */
export interface Sample {
  index: number;
  prompt?: string;
  response?: string;
  promptTokens?: number[];
  responseTokens?: number[];
  /** What the algorithm learns from: reward model and reward function together. */
  reward?: number;
  finish: 'stop' | 'length';
}

/** One line of the arithmetic that decides whether a run fits its memory budget. */
export interface MemoryLine {
  /** In a run of several pools. */
  pool?: string;
  what: string;
  bytes: number;
}

/** GPUs `first` to `last`, on which the ranks of a pool compute. */
export interface PoolGpus {
  /** In a run of several pools. */
  pool?: string;
  first: number;
  last: number;
  /** With those of other pools, for want of GPUs. */
  shared: boolean;
}

export interface MemoryTable {
  /** Of a run on GPUs. */
  gpus?: readonly PoolGpus[];
  lines: readonly MemoryLine[];
  /** Of a device; in a run of several pools, of the pool that needs most. */
  totalBytes: number;
  budgetBytes: number;
}

export type TrainEvent =
  | {
      type: 'start';
      /** The last step already done: 0, or that of the checkpoint that the run continues. */
      step: number;
      steps: number;
      config: Config;
      /** The run folder, absolute. */
      output: string;
      resumedFrom?: string;
      memory: MemoryTable;
    }
  | { type: 'step'; step: number; steps: number; metrics: MetricsRow }
  | { type: 'evaluation'; step: number; metrics: MetricsRow; samples: readonly Sample[] }
  | { type: 'sample'; step: number; sample: Sample }
  | {
      /** A checkpoint is in its place; with `checkpoint.async` later steps may have been reported before. */
      type: 'checkpoint';
      step: number;
      directory: string;
      /** Until it was in place. */
      seconds: number;
      /** Of those, how long training stood still for it. */
      waitedSeconds: number;
      /** Copied into host memory, from which the files were written. */
      copiedBytes: number;
    }
  | { type: 'warning'; code: string; message: string; step: number }
  | { type: 'interrupted'; step: number /** Absent when no step was done. */; checkpoint?: string; output: string }
  | { type: 'done'; step: number; checkpoint: string; output: string; seconds: number };
