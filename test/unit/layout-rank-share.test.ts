/** A rank's share as a shape agrees with the tensors that it holds. */
import { describe, expect, test } from 'vitest';
import { rankShare } from '../../src/layout/rank-share.js';
import { shardTable } from '../../src/layout/shards.js';
import { smallShapes } from './layout-shapes.js';

const parts = 8;
const layouts = [1, 2, 3].flatMap((pipeline) => [1, 2, 4, 8].map((tensor) => ({ pipeline, tensor, data: 1 })));
const cases = smallShapes.flatMap(([name, shape]) =>
  layouts.map((degrees) => [name, degrees.pipeline, degrees.tensor, shape, degrees] as const),
);

describe.each(cases)('%s on %i stages x %i tensor ranks', (_, pipeline, tensor, shape, degrees) => {
  test('sizes are those of the tensors, layers and rows of the vocabulary those that follow the ranks before', () => {
    for (let rank = 0; rank < pipeline * tensor; rank++) {
      const share = rankShare(shape, parts, degrees, rank);
      const { shape: own, firstLayer } = share;
      const table = new Map(shardTable(shape, parts, degrees, rank).map((spec) => [spec.name, spec]));
      const layers = [...table.keys()].flatMap((name) => /^layers\.(\d+)\.qkv$/.exec(name)?.[1] ?? []).map(Number);
      expect(layers).toEqual(Array.from({ length: own.layers }, (_, i) => firstLayer + i));
      expect(own.windows).toEqual(shape.windows.slice(firstLayer, firstLayer + own.layers));
      const at = (name: string) => table.get(`layers.${firstLayer}.${name}`)!;
      expect(at('qkv').out).toBe((own.heads + 2 * own.keyValueHeads) * own.headWidth);
      expect(at('qkv').sizes).toHaveLength(share.parts);
      expect(at('attentionOut').in).toBe(own.heads * own.headWidth);
      expect(at('down').in).toBe(own.feedForward);
      expect(share.lastStage).toBe(table.has('finalNorm'));
      for (const name of ['embed', 'vocabulary']) {
        const matrix = table.get(name);
        if (matrix === undefined) continue;
        expect(matrix.out).toBe(own.vocabulary);
        expect(matrix.blocks[0]!.rows[0]!.begin).toBe(share.vocabularyBegin);
      }
    }
  });
});

test.each(smallShapes)('%s: the share of a single rank is the model', (_, shape) => {
  expect(rankShare(shape, parts, { pipeline: 1, tensor: 1, data: 1 }, 0)).toMatchObject({
    ...{ shape, parts, firstLayer: 0, vocabularyBegin: 0, lastStage: true },
    ...{ tensorRanks: 1, keyValueRanks: 1, dataRank: 0, dataRanks: 1 },
  });
});
