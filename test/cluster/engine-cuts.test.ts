/**
 * An engine over ranks cuts a batch among its replicas itself; a worker group cuts it by the protocols that the worker carries.
 * Both give every rank the same rows, in every layout: a model's ranks may be driven either way.
 */
import { describe, expect, expectTypeOf, it } from 'vitest';
import { rewardBatch } from '../../src/algorithms/reward-model.js';
import { findProtocol, type TransferProtocol } from '../../src/cluster/protocols.js';
import { evenRanges, packBatch, type TokenBatch } from '../../src/data/batch.js';
import type { Engine, MicroBatches } from '../../src/engine/engine.js';
import { cutRows } from '../../src/engine/token-shards.js';
import { coordinatesOf, generationReplicas, worldSize } from '../../src/layout/parallel.js';
import { bradleyTerry } from '../../src/losses/reward-model.js';
import { crossEntropy } from '../../src/losses/sft.js';
import { ActorWorker } from '../../src/workers/actor.js';
import { CostWorker } from '../../src/workers/cost.js';
import { CriticWorker } from '../../src/workers/critic.js';
import { type LearnerSettings, learner } from '../../src/workers/learner.js';
import type { Protocols } from '../../src/workers/protocols.js';
import { ReferenceWorker } from '../../src/workers/reference.js';
import { RewardWorker } from '../../src/workers/reward.js';
import { degrees, layouts } from './counting-worker.js';

const tables: Record<string, Readonly<Record<string, TransferProtocol>>> = {
  actor: ActorWorker.protocols,
  critic: CriticWorker.protocols,
  reference: ReferenceWorker.protocols,
  reward: RewardWorker.protocols,
  'reward that learns': RewardWorker.protocolsOfLearner,
  cost: CostWorker.protocols,
};

/** Of calls in which the engine does the same: the protocols of all workers. */
function callsOf(kind: 'generate' | 'compute' | 'update'): (readonly [call: string, protocol: TransferProtocol])[] {
  return Object.entries(tables).flatMap(([worker, table]) =>
    Object.entries(table)
      .filter(([method]) => method.startsWith(kind))
      .map(([method, protocol]) => [`${worker}.${method}`, protocol] as const),
  );
}

/** Sequence i begins with token i. */
const batchOf = (rows: number): TokenBatch =>
  packBatch(Array.from({ length: rows }, (_, i) => Int32Array.from({ length: 1 + (i % 3) }, (_, t) => i + 100 * t)));

const counts = [1, 2, 3, 5, 7, 8, 13, 16];

describe('every rank gets the same rows by the engine and by the protocol of', () => {
  it.each(callsOf('compute'))('%s', (_, protocol) => {
    for (const ranks of layouts(8)) {
      const { layout } = ranks;
      for (const rows of counts) {
        const batch = batchOf(rows);
        const byEngine = cutRows(batch, layout.data);
        const expected = Array.from(
          { length: worldSize(layout) },
          (_, rank) => byEngine[coordinatesOf(rank, layout).data],
        );
        expect([layout, rows, findProtocol(protocol).distribute(batch, ranks)]).toEqual([layout, rows, expected]);
      }
    }
  });

  it.each(callsOf('generate'))('%s', (_, protocol) => {
    for (const ranks of layouts(8)) {
      const { replicaOfRank } = generationReplicas(ranks.layout, ranks.generation);
      const replicas = Math.max(...replicaOfRank) + 1;
      for (const rows of counts) {
        const prompts = Array.from({ length: rows }, (_, i) => i);
        const byEngine = evenRanges(rows, replicas).map(({ begin, end }) => prompts.slice(begin, end));
        const byProtocol = findProtocol(protocol).distribute(prompts, ranks);
        expect(byProtocol).toEqual(replicaOfRank.map((replica) => byEngine[replica]));
      }
    }
  });

  it.each(callsOf('update'))('%s, of tokens and of pairs', async (_, protocol) => {
    const pair = (i: number) => ({ chosen: Int32Array.of(i, 1), rejected: Int32Array.of(i, 2, 3), margin: 0 });
    for (const data of [1, 2, 3, 4]) {
      for (const rows of counts) {
        const text = { ...batchOf(rows), columns: {} };
        const batches = [
          { batch: { ...text, mask: new Uint8Array(text.tokens.length).fill(1) }, loss: crossEntropy() },
          { batch: rewardBatch(Array.from({ length: rows }, (_, i) => pair(i))), loss: bradleyTerry() },
        ];
        for (const { batch, loss } of batches) {
          const seen: number[][] = [];
          await learner(watched(data, seen), settings).update(batch, loss, { epochs: 1, miniBatches: 1, iteration: 1 });
          const parts = findProtocol(protocol).distribute(batch, { layout: degrees(1, 1, data) }) as TokenBatch[];
          expect(seen).toEqual(parts.map(({ tokens }) => [...tokens]));
        }
      }
    }
  });
});

it('a table names every call of its worker, and no other method', () => {
  type Learner = ReturnType<typeof learner>;
  expectTypeOf<{ update: '3D_PROTO' }>().not.toExtend<Protocols<Learner>>();
  expectTypeOf<keyof Protocols<ActorWorker>>().toEqualTypeOf<keyof typeof ActorWorker.protocols>();
  expectTypeOf<keyof Protocols<ActorWorker>>().not.toExtend<'mismatch'>();
});

const settings: LearnerSettings = {
  ...{ microTokens: 8, seed: 0, learningRate: () => 0 },
  optimizer: { betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0, clipNorm: 1 },
};

/** An engine of so many replicas that learns nothing and notes the tokens that each receives. */
function watched(replicas: number, seen: number[][]): Engine {
  return {
    replicas,
    accumulate: async (microBatches: MicroBatches) => {
      for (const own of microBatches) seen.push(own.flatMap(({ tokens }) => [...tokens]));
    },
    step: async () => ({ gradientNorm: 1 }),
  } as unknown as Engine;
}
