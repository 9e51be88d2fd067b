/** The frozen policy that the KL term measures against (HybridFlow, Table 4). */
import type { TokenBatch } from '../data/batch.js';
import type { Engine } from '../engine/engine.js';
import { type ForwardSettings, forwardAll } from './batches.js';
import type { Protocols } from './protocols.js';

export type ReferenceWorker = ReturnType<typeof create>;

/** A worker over an engine with a language-model head. */
function create(engine: Engine, settings: ForwardSettings) {
  return {
    /** [T] log p(token t+1 | tokens 0..t) at the sampling temperature */
    computeLogprobs: (batch: TokenBatch) => forwardAll(engine, batch, 'logprobs', settings),
  };
}

const protocols = { computeLogprobs: '3D_PROTO' } as const satisfies Protocols<ReferenceWorker>;

/** `create(engine, settings)`: a frozen policy, over an engine with a language-model head. `protocols` are those of a group of them. */
export const ReferenceWorker = { create, protocols };
