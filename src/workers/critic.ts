/** The value function: predicts returns and learns from them (HybridFlow, Table 4). */
import type { TokenBatch } from '../data/batch.js';
import type { Engine } from '../engine/engine.js';
import { forwardAll } from './batches.js';
import { type LearnerSettings, learner } from './learner.js';

export type CriticWorker = ReturnType<typeof CriticWorker.create>;

export const CriticWorker = {
  /** A worker over an engine with a value head. */
  create: (engine: Engine, settings: LearnerSettings) => ({
    /** [T] V(tokens 0..t) */
    computeValues: (batch: TokenBatch) => forwardAll(engine, batch, 'values', settings),
    ...learner(engine, settings),
  }),
};
