/** The value function: predicts returns and learns from them (HybridFlow, Table 4). */
import type { TokenBatch } from '../data/batch.js';
import type { Engine } from '../engine/engine.js';
import { forwardAll } from './batches.js';
import { type LearnerSettings, learner, learnerProtocols } from './learner.js';
import type { Protocols } from './protocols.js';

export type CriticWorker = ReturnType<typeof create>;

/** A worker over an engine with a value head. */
function create(engine: Engine, settings: LearnerSettings) {
  return {
    /** [T] V(tokens 0..t) */
    computeValues: (batch: TokenBatch) => forwardAll(engine, batch, 'values', settings),
    ...learner(engine, settings),
  };
}

const protocols = { computeValues: '3D_PROTO', ...learnerProtocols } as const satisfies Protocols<CriticWorker>;

/** `create(engine, settings)`: a value function, over an engine with a value head. `protocols` are those of a group of them. */
export const CriticWorker = { create, protocols };
