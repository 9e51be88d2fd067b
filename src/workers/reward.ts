/** The reward model: a number per answer (HybridFlow, Table 4). Being one, it can also be taught from pairs. */
import type { TokenBatch } from '../data/batch.js';
import { scorePosition } from '../data/score-position.js';
import type { Engine } from '../engine/engine.js';
import { type ForwardSettings, forwardAll, offsets } from './batches.js';
import { type LearnerSettings, learner, learnerProtocols } from './learner.js';
import type { Protocols } from './protocols.js';

export type RewardWorker = ReturnType<typeof create>;

/** A frozen reward model over an engine with a score head. */
function create(engine: Engine, settings: ForwardSettings) {
  return {
    /** Scores of whole sequences, read at the rightmost token that is not padding. */
    computeRewards: async (batch: TokenBatch): Promise<{ scores: Float64Array }> => {
      const values = await forwardAll(engine, batch, 'values', settings);
      const starts = offsets(batch.lengths);
      const scores = Float64Array.from(batch.lengths, (length, row) => {
        const tokens = batch.tokens.subarray(starts[row]!, starts[row]! + length);
        return values[starts[row]! + scorePosition(tokens, engine.shape.padToken)]!;
      });
      return { scores };
    },
  };
}

/** A reward model that learns from pairs. */
function createLearner(engine: Engine, settings: LearnerSettings) {
  return { ...create(engine, settings), ...learner(engine, settings) };
}

const protocols = { computeRewards: '3D_PROTO' } as const satisfies Protocols<RewardWorker>;

const protocolsOfLearner = { ...protocols, ...learnerProtocols } as const satisfies Protocols<
  ReturnType<typeof createLearner>
>;

/** `create(engine, settings)`: a reward model, over an engine with a score head; `createLearner`: one that learns. `protocols` are those of a group of them. */
export const RewardWorker = { create, protocols, createLearner, protocolsOfLearner };
