/** The cost model: a reward model whose scores are costs, of which more is worse (HybridFlow, Table 4; Safe RLHF). */
import type { Engine } from '../engine/engine.js';
import type { ForwardSettings } from './batches.js';
import type { Protocols } from './protocols.js';
import { RewardWorker } from './reward.js';

export type CostWorker = ReturnType<typeof create>;

/** A frozen cost model over an engine with a score head. */
function create(engine: Engine, settings: ForwardSettings) {
  return {
    /** Costs of whole sequences, read where a reward model's scores are. */
    computeCosts: RewardWorker.create(engine, settings).computeRewards,
  };
}

const protocols = { computeCosts: RewardWorker.protocols.computeRewards } as const satisfies Protocols<CostWorker>;

/** `create(engine, settings)`: a cost model, over an engine with a score head. `protocols` are those of a group of them. */
export const CostWorker = { create, protocols };
