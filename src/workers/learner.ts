/** What the workers that learn share: updates and evaluations of one engine's model. */
import type { Engine, StepOptions } from '../engine/engine.js';
import type { Experience, Loss } from '../losses/loss.js';
import type { ForwardSettings } from './batches.js';
import type { Canary } from './canary.js';
import { type Addition, computeLoss, type LearnResult, learn } from './learn.js';
import type { Protocols } from './protocols.js';

export interface LearnerSettings extends ForwardSettings {
  optimizer: Omit<StepOptions, 'learningRate' | 'step'>;
  /** By iteration, from 1. */
  learningRate(iteration: number): number;
  /** Orders the rows of an update's mini-batches. */
  seed: number;
  /** What the model has learned so far; updates add to it. Default: nothing. */
  count?: UpdateCount;
}

/** What Adam's step and the order of rows are functions of. Who saves the moments saves it with them. */
export interface UpdateCount {
  updates: number;
  /** Over the rows of a batch. */
  passes: number;
}

/** Settings that keep a count from one update to the next. */
export const counting = (settings: LearnerSettings) => ({ count: { updates: 0, passes: 0 }, ...settings });

export interface UpdateOptions {
  epochs: number;
  miniBatches: number;
  /** From 1; with the settings it decides the learning rate. */
  iteration: number;
  /** Batches whose losses are part of the same steps. */
  also?: readonly Addition[] | undefined;
}

/** Learns from one batch; a canary watches the first mini-batch. */
export async function update(
  engine: Engine,
  batch: Experience,
  loss: Loss,
  { epochs, miniBatches, iteration, also }: UpdateOptions,
  { optimizer, learningRate, seed, count, ...forward }: ReturnType<typeof counting>,
  canary?: Canary,
): Promise<LearnResult> {
  const result = await learn(engine, batch, loss, {
    ...forward,
    epochs,
    miniBatches,
    also,
    optimizer: {
      ...optimizer,
      learningRate: learningRate(iteration),
      step: count.updates + 1,
    },
    // One mini-batch has no order to choose, and packed order keeps its sums comparable with any other trainer's.
    ...(miniBatches > 1 ? { shuffle: { seed, firstPass: count.passes } } : {}),
    ...(canary ? { canary } : {}),
  });
  count.updates += result.updates;
  count.passes += epochs;
  return result;
}

/** The learner's part of a worker. */
export function learner(engine: Engine, settings: LearnerSettings) {
  const counted = counting(settings);
  return {
    update: (batch: Experience, loss: Loss, options: UpdateOptions) => update(engine, batch, loss, options, counted),
    computeLoss: (batch: Experience, loss: Loss) => computeLoss(engine, batch, loss, settings),
  };
}

export const learnerProtocols = {
  update: '3D_PROTO',
  computeLoss: '3D_PROTO',
} as const satisfies Protocols<ReturnType<typeof learner>>;
