/** What the workers that learn share: updates and evaluations of one engine's model. */
import type { Engine, StepOptions } from '../engine/engine.js';
import type { Loss } from '../losses/loss.js';
import type { ForwardSettings } from './batches.js';
import type { Canary } from './canary.js';
import { type Addition, computeLoss, type LearningBatch, type LearnResult, learn } from './learn.js';
import type { Protocols } from './protocols.js';

export interface LearnerSettings extends ForwardSettings {
  optimizer: Omit<StepOptions, 'learningRate' | 'step'>;
  /** By iteration, from 1. */
  learningRate(iteration: number): number;
  /** Orders the rows of an update's mini-batches. */
  seed: number;
}

export interface UpdateOptions {
  epochs: number;
  miniBatches: number;
  /** From 1; with the settings it decides the order of rows, the learning rate and Adam's step. */
  iteration: number;
  /** Batches whose losses are part of the same steps. */
  also?: readonly Addition[] | undefined;
}

/** Learns from one batch; a canary watches the first mini-batch. */
export function update(
  engine: Engine,
  batch: LearningBatch,
  loss: Loss,
  { epochs, miniBatches, iteration, also }: UpdateOptions,
  { optimizer, learningRate, seed, ...forward }: LearnerSettings,
  canary?: Canary,
): Promise<LearnResult> {
  return learn(engine, batch, loss, {
    ...forward,
    epochs,
    miniBatches,
    also,
    optimizer: {
      ...optimizer,
      learningRate: learningRate(iteration),
      step: (iteration - 1) * epochs * miniBatches + 1,
    },
    // One mini-batch has no order to choose, and packed order keeps its sums comparable with any other trainer's.
    ...(miniBatches > 1 ? { shuffle: { seed, firstPass: (iteration - 1) * epochs } } : {}),
    ...(canary ? { canary } : {}),
  });
}

/** The learner's part of a worker. */
export function learner(engine: Engine, settings: LearnerSettings) {
  return {
    update: (batch: LearningBatch, loss: Loss, options: UpdateOptions) =>
      update(engine, batch, loss, options, settings),
    computeLoss: (batch: LearningBatch, loss: Loss) => computeLoss(engine, batch, loss, settings),
  };
}

export const learnerProtocols = {
  update: '3D_PROTO',
  computeLoss: '3D_PROTO',
} as const satisfies Protocols<ReturnType<typeof learner>>;
