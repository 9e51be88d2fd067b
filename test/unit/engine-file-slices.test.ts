import { describe, expect, test } from 'vitest';
import type { FileTensor } from '../../src/engine/engine.js';
import { type HeldTensor, slicesToLoad, slicesToSave } from '../../src/engine/file-slices.js';
import type { NativeSlice } from '../../src/engine/native.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { shardTable } from '../../src/layout/shards.js';
import { tensorTable } from '../../src/layout/tensor-table.js';
import { smallShapes } from './layout-shapes.js';

const parts = 8;
const layouts = [1, 2, 3].flatMap((pipeline) => [1, 2, 4, 8].map((tensor) => ({ pipeline, tensor, data: 1 })));
const cases = smallShapes.flatMap(([name, shape]) =>
  layouts.map((degrees) => [name, degrees.pipeline, degrees.tensor, shape, degrees] as const),
);

/** The model's tensors one behind the other, two files of them. */
function filesOf(shape: ModelShape): { tensors: FileTensor[]; sizes: Map<string, number> } {
  const sizes = new Map<string, number>();
  const tensors = ['weights' as const, 'moment1' as const].flatMap((space) =>
    tensorTable(shape, parts)
      .flatMap(({ sources }) => sources)
      .map((source): FileTensor => {
        const offset = sizes.get(space) ?? 8;
        sizes.set(space, offset + source.shape.reduce((a, b) => a * b, 4));
        return { name: source.name, space, file: space, offset, dtype: 'F32' };
      }),
  );
  return { tensors, sizes };
}

/** Calls `visit` for the place in its file of every number of a slice, and where the rank has it. */
function eachPlace(
  slice: NativeSlice,
  visit: (place: number, tensor: number, row: number, column: number) => void,
): void {
  const { rows, columns, columnBegin, columnCount, transposed, offset, pieces } = slice;
  for (let i = 0; i < pieces.length; i += 4) {
    const [sourceRow, tensor, row, count] = pieces.slice(i, i + 4) as [number, number, number, number];
    for (let r = 0; r < count; r++) {
      for (let c = 0; c < columnCount; c++) {
        const [y, x] = [sourceRow + r, columnBegin + c];
        visit((offset - 8) / 4 + (transposed ? x * rows + y : y * columns + x), tensor, row + r, c);
      }
    }
  }
}

describe.each(cases)('%s on %i stages x %i tensor ranks', (_, _pipeline, _tensor, shape, degrees) => {
  const tables: HeldTensor[][] = Array.from({ length: degrees.pipeline * degrees.tensor }, (_, rank) =>
    shardTable(shape, parts, degrees, rank),
  );
  const { tensors, sizes } = filesOf(shape);
  const expectOnce = (counts: Uint8Array) => expect(counts.findIndex((count) => count !== 1)).toBe(-1);

  test('the ranks together write every number of every file once', () => {
    const counts = new Map([...sizes].map(([file, bytes]) => [file, new Uint8Array((bytes - 8) / 4)]));
    for (const [rank, table] of tables.entries()) {
      for (const slice of slicesToSave(table, rank, tensors)) {
        eachPlace(slice, (place) => counts.get(slice.file)![place]!++);
      }
    }
    for (const count of counts.values()) expectOnce(count);
  });

  test('each rank reads every number that it holds once, going forwards through each file', () => {
    for (const table of tables) {
      const slices = slicesToLoad(table, tensors);
      for (const file of sizes.keys()) {
        const counts = table.map((spec) => new Uint8Array(spec.out * spec.in));
        const own = slices.filter((slice) => slice.file === file);
        for (const slice of own) {
          eachPlace(slice, (_, tensor, row, column) => counts[tensor]![row * table[tensor]!.in + column]!++);
        }
        for (const count of counts) expectOnce(count);
        expect(own.map(({ offset }) => offset)).toEqual(own.map(({ offset }) => offset).sort((a, b) => a - b));
      }
      expect(new Set(slices.map(({ file }) => file)).size).toBe(
        slices.filter(({ file }, i) => file !== slices[i - 1]?.file).length,
      );
    }
  });
});
