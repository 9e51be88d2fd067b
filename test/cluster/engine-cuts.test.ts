/**
 * An engine over ranks cuts a batch among its replicas itself; a worker group cuts it by a transfer protocol. Both give every rank
 * the same rows, in every layout: a model's ranks may be driven either way.
 */
import { describe, expect, it } from 'vitest';
import { transferProtocols } from '../../src/cluster/protocols.js';
import { evenRanges, packBatch, type TokenBatch } from '../../src/data/batch.js';
import { cutRows } from '../../src/engine/token-shards.js';
import { coordinatesOf, generationReplicas, worldSize } from '../../src/layout/parallel.js';
import { layouts } from './counting-worker.js';

/** Sequence i begins with token i. */
const batchOf = (rows: number): TokenBatch =>
  packBatch(Array.from({ length: rows }, (_, i) => Int32Array.from({ length: 1 + (i % 3) }, (_, t) => i + 100 * t)));

const counts = [1, 2, 3, 5, 7, 8, 13, 16];

describe('every rank gets the same rows', () => {
  it('of a batch that replicas share, by the engine and by 3D_PROTO', () => {
    for (const { layout } of layouts(8)) {
      for (const rows of counts) {
        const batch = batchOf(rows);
        const byEngine = cutRows(batch, layout.data);
        const byProtocol = transferProtocols['3D_PROTO'].distribute(batch, { layout });
        const expected = Array.from(
          { length: worldSize(layout) },
          (_, rank) => byEngine[coordinatesOf(rank, layout).data],
        );
        expect([layout, rows, byProtocol]).toEqual([layout, rows, expected]);
      }
    }
  });

  it('of prompts that generation replicas share, by the engine and by 3D_ALL_MICRO_DP', () => {
    for (const ranks of layouts(8)) {
      const { replicaOfRank } = generationReplicas(ranks.layout, ranks.generation);
      const replicas = Math.max(...replicaOfRank) + 1;
      for (const rows of counts) {
        const prompts = Array.from({ length: rows }, (_, i) => i);
        const byEngine = evenRanges(rows, replicas).map(({ begin, end }) => prompts.slice(begin, end));
        const byProtocol = transferProtocols['3D_ALL_MICRO_DP'].distribute(prompts, ranks);
        expect(byProtocol).toEqual(replicaOfRank.map((replica) => byEngine[replica]));
      }
    }
  });
});
