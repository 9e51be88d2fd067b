/** The frozen policy that the KL term measures against (HybridFlow, Table 4). */
import type { TokenBatch } from '../data/batch.js';
import type { Engine } from '../engine/engine.js';
import { type ForwardSettings, forwardAll } from './batches.js';

export type ReferenceWorker = ReturnType<typeof ReferenceWorker.create>;

export const ReferenceWorker = {
  /** A worker over an engine with a language-model head. */
  create: (engine: Engine, settings: ForwardSettings) => ({
    /** [T] log p(token t+1 | tokens 0..t) at the sampling temperature */
    computeLogprobs: (batch: TokenBatch) => forwardAll(engine, batch, 'logprobs', settings),
  }),
};
