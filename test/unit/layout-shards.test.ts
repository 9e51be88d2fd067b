import { describe, expect, test } from 'vitest';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { type Degrees, tensorGroups } from '../../src/layout/parallel.js';
import { type Copies, type ShardTensor, shardTable } from '../../src/layout/shards.js';
import { packedElements, type TensorSource, type TensorSpec, tensorTable } from '../../src/layout/tensor-table.js';
import { gpt2, rotary, smallShapes } from './layout-shapes.js';

const layouts = [1, 2, 3].flatMap((pipeline) => [1, 2, 4, 8].map((tensor) => ({ pipeline, tensor, data: 1 })));
const cases = smallShapes.flatMap(([name, shape]) =>
  layouts.map((degrees) => [name, degrees.pipeline, degrees.tensor, shape, degrees] as const),
);
const parts = 8;

const tablesOf = (shape: ModelShape, degrees: Degrees): ShardTensor[][] =>
  Array.from({ length: degrees.pipeline * degrees.tensor }, (_, rank) => shardTable(shape, parts, degrees, rank));

/** Calls `visit` for every element of a tensor: its row and column, and its place in the checkpoint's tensor. */
function eachElement(
  spec: TensorSpec,
  visit: (row: number, column: number, source: TensorSource, place: number) => void,
): void {
  for (const source of spec.sources) {
    const { shape, transposed, columns } = source;
    const [first, second = 1] = shape as [number, number?];
    for (const piece of source.pieces) {
      for (let i = 0; i < piece.rows; i++) {
        for (let column = 0; column < (columns?.count ?? spec.in); column++) {
          const [r, c] = [piece.sourceRow + i, column + (columns?.begin ?? 0)];
          const inside = transposed ? r < second && c < first : r < first && c < second;
          if (!inside) throw new Error(`${spec.name} reads outside ${source.name}`);
          visit(piece.row + i, column, source, transposed ? c * second + r : r * second + c);
        }
      }
    }
  }
}

const copiesAt = (tensor: ShardTensor, row: number): Copies | undefined =>
  tensor.copies.find(({ begin, end }) => row >= begin && row < end);

describe.each(cases)('%s on %i stages x %i tensor ranks', (_, _pipeline, _tensor, shape, degrees) => {
  const tables = tablesOf(shape, degrees);
  const whole = tensorTable(shape, parts);

  test('every element of the checkpoint is held by the ranks that are declared to hold it, and owned once', () => {
    // Bit r of an element: rank r holds it; and the ranks that a holder declares.
    const held = new Map(
      whole.flatMap((spec) => spec.sources.map((s) => [s.name, new Int32Array(sizeOf(s))] as const)),
    );
    const declared = new Map([...held].map(([name, bits]) => [name, new Int32Array(bits.length)]));
    let wrong = 0;
    tables.forEach((table, rank) => {
      for (const tensor of table) {
        const filled = new Uint8Array(tensor.out * tensor.in);
        eachElement(tensor, (row, column, source, place) => {
          filled[row * tensor.in + column]!++;
          const bits = held.get(source.name)!;
          if ((bits[place]! & (1 << rank)) !== 0) wrong++;
          bits[place]! |= 1 << rank;
          const ranks = copiesAt(tensor, row)?.ranks ?? [rank];
          if (!ranks.includes(rank) || ranks.some((other, i) => i > 0 && other <= ranks[i - 1]!)) wrong++;
          const claim = ranks.reduce((mask, other) => mask | (1 << other), 0);
          const claims = declared.get(source.name)!;
          if (claims[place] !== 0 && claims[place] !== claim) wrong++;
          claims[place] = claim;
        });
        if (filled.some((count) => count !== 1)) wrong++;
      }
    });
    for (const [name, bits] of held) {
      if (bits.some((mask, place) => mask === 0 || mask !== declared.get(name)![place])) wrong++;
    }
    expect(wrong).toBe(0);
  });

  test('blocks say which elements of the whole tensor a rank has', () => {
    const wholePlaces = new Map(whole.map((spec) => [spec.name, placesOf(spec)]));
    let wrong = 0;
    for (const tensor of tables.flat()) {
      const places = placesOf(tensor);
      const expected = wholePlaces.get(tensor.name)!;
      const spec = whole.find(({ name }) => name === tensor.name)!;
      const rows = tensor.split === 'in' ? tensor.blocks[0]!.rows : tensor.blocks.flatMap((block) => block.rows);
      const columns = tensor.split === 'in' ? tensor.blocks.map((block) => block.columns) : [tensor.blocks[0]!.columns];
      let local = 0;
      for (const range of rows) {
        for (let row = range.begin; row < range.end; row++) {
          for (const { begin, end } of columns) {
            for (let column = begin; column < end; column++) {
              if (places[local++] !== expected[row * spec.in + column]) wrong++;
            }
          }
        }
      }
      if (local !== places.length) wrong++;
    }
    expect(wrong).toBe(0);
  });

  test('sizes and elements are those of the rank; a stage of one rank has the table as it is', () => {
    for (const tensor of tables.flat()) {
      const total = tensor.sizes.reduce((a, b) => a + b, 0);
      expect(total).toBe(tensor.split === 'in' ? tensor.in : tensor.out);
      expect(tensor.sizes.length).toBe(tensor.split === 'none' ? 1 : parts / degrees.tensor);
      const packed = (size: number) =>
        tensor.split === 'in' ? packedElements(tensor.out, size) : packedElements(size, tensor.in);
      const expected =
        tensor.kind === 'vector' ? tensor.out * tensor.in : tensor.sizes.map(packed).reduce((a, b) => a + b, 0);
      expect(tensor.elements).toBe(expected);
    }
    if (degrees.pipeline * degrees.tensor === 1) {
      expect(tables[0]!.map(({ blocks, copies, ...spec }) => spec)).toEqual(whole);
    }
  });

  test("a rank's qkv is laid out as that of a model with its own heads and parts", () => {
    const { heads, keyValueHeads, headWidth } = shape;
    const t = degrees.tensor;
    const groups = Math.max(1, keyValueHeads / t);
    const localParts = parts / t;
    tables.slice(0, t).forEach((table, rank) => {
      const rows: number[] = [];
      for (let part = 0; part < localParts; part++) {
        const query = Array.from({ length: heads / parts }, (_, i) => (rank * heads) / t + (part * heads) / parts + i);
        const ratio = groups / localParts;
        const first = Math.floor((rank * keyValueHeads) / t) + Math.floor(part * ratio);
        const owned = ratio >= 1 ? ratio : part % (1 / ratio) === 0 ? 1 : 0;
        const keys = Array.from({ length: owned }, (_, i) => heads + first + i);
        const values = keys.map((key) => key + keyValueHeads);
        for (const head of [...query, ...keys, ...values]) {
          for (let i = 0; i < headWidth; i++) rows.push(head * headWidth + i);
        }
      }
      expect(stackedRows(table.find(({ name }) => name === 'layers.0.qkv')!, shape)).toEqual(rows);
      const bias = table.find(({ name }) => name === 'layers.0.qkvBias');
      if (bias) expect(stackedRows(bias, shape)).toEqual(rows);
    });
  });
});

const sizeOf = ({ shape }: TensorSource) => shape.reduce((a, b) => a * b, 1);

/** For each element of a tensor, row-major: its place in the checkpoint, unique over the tensor's sources. */
function placesOf(spec: TensorSpec): Float64Array {
  const places = new Float64Array(spec.out * spec.in);
  eachElement(spec, (row, column, source, place) => {
    places[row * spec.in + column] = spec.sources.indexOf(source) * 2 ** 32 + place;
  });
  return places;
}

/** Rows of the checkpoint's q, k and v, counted through all three, in the order of the tensor's rows. */
function stackedRows(tensor: TensorSpec, shape: ModelShape): number[] {
  const starts = [0, shape.heads, shape.heads + shape.keyValueHeads].map((head) => head * shape.headWidth);
  const rows: number[] = [];
  for (const [index, source] of tensor.sources.entries()) {
    for (const piece of source.pieces) {
      for (let i = 0; i < piece.rows; i++) rows[piece.row + i] = starts[index]! + piece.sourceRow + i;
    }
  }
  return rows;
}

describe('what is shared', () => {
  const copiesOf = (shape: ModelShape, degrees: Degrees, name: string) =>
    tablesOf(shape, degrees).map((table) => table.find((tensor) => tensor.name === name)?.copies);

  test('four ranks share a key/value head: the first owns it, its rows follow the first query heads', () => {
    const shape = rotary();
    const degrees = { pipeline: 1, tensor: 8, data: 1 };
    const shared = (ranks: number[]): Copies[] => [{ begin: 6, end: 18, ranks, gradient: 'partial' }];
    const expected = [0, 0, 0, 0, 4, 4, 4, 4].map((owner) => shared([owner, owner + 1, owner + 2, owner + 3]));
    expect(copiesOf(shape, degrees, 'layers.1.qkv')).toEqual(expected);
    expect(copiesOf(rotary({ attention_bias: true }), degrees, 'layers.1.qkvBias')).toEqual(expected);
    expect(copiesOf(shape, { ...degrees, tensor: 2 }, 'layers.1.qkv')).toEqual([[], []]);
    const qkv = shardTable(shape, parts, degrees, 6).find(({ name }) => name === 'layers.1.qkv')!;
    expect(qkv.sources.map((source) => source.pieces)).toEqual([
      [{ sourceRow: 36, rows: 6, row: 0 }],
      [{ sourceRow: 6, rows: 6, row: 6 }],
      [{ sourceRow: 6, rows: 6, row: 12 }],
    ]);
  });

  test('norms and biases after a sum are whole on every tensor rank, head norms sum their gradients', () => {
    const degrees = { pipeline: 3, tensor: 2, data: 2 };
    const groups = tensorGroups(degrees);
    const qwen = rotary({ model_type: 'qwen3' });
    for (const [shape, name, gradient] of [
      [qwen, 'norm1', 'equal'],
      [qwen, 'queryNorm', 'partial'],
      [qwen, 'keyNorm', 'partial'],
      [gpt2(), 'attentionOutBias', 'equal'],
      [gpt2(), 'norm2Bias', 'equal'],
      [gpt2(), 'downBias', 'equal'],
    ] as const) {
      for (const rank of [2, 3, 8]) {
        const table = shardTable(shape, parts, degrees, rank);
        const { copies, out } = table.find((tensor) => tensor.name === `layers.1.${name}`)!;
        const ranks = groups.find((group) => group.includes(rank))!;
        expect(copies).toEqual([{ begin: 0, end: out, ranks, gradient }]);
      }
    }
    expect(copiesOf(gpt2(), degrees, 'layers.0.upBias').slice(0, 2)).toEqual([[], []]);
  });

  test('a tied embedding lies on the first and the last stage, with one accumulator on each', () => {
    const degrees = { pipeline: 3, tensor: 2, data: 1 };
    const tied = rotary({ tie_word_embeddings: true });
    const tables = tablesOf(tied, degrees);
    const embeds = tables.map((table) => table.find(({ name }) => name === 'embed'));
    expect(embeds.map((embed) => embed?.copies[0]?.ranks)).toEqual([
      [0, 4],
      [1, 5],
      undefined,
      undefined,
      [0, 4],
      [1, 5],
    ]);
    expect(embeds.map((embed) => embed?.tied)).toEqual([false, false, undefined, undefined, false, false]);
    expect(embeds[0]!.copies[0]).toMatchObject({ begin: 0, end: embeds[0]!.out, gradient: 'partial' });
    expect(tables[4]!.at(-1)!.name).toBe('embed');
    const whole = tablesOf(tied, { ...degrees, pipeline: 1 });
    expect(whole.map((table) => table.filter(({ tied }) => tied).map(({ name, copies }) => [name, copies]))).toEqual([
      [['embed', []]],
      [['embed', []]],
    ]);
  });

  test('stages: the embedding first, the final norm and the head last', () => {
    const namesOf = (shape: ModelShape) =>
      tablesOf(shape, { pipeline: 2, tensor: 1, data: 1 }).map((table) =>
        table.map(({ name }) => name).filter((name) => !/^layers\.\d+\.[^n]/.test(name)),
      );
    expect(namesOf(gpt2())).toEqual([
      ['embed', 'positions', ...[0, 1].flatMap(layerNorms)],
      [...layerNorms(2), 'finalNorm', 'finalNormBias', 'embed'],
    ]);
    expect(namesOf(rotary())[1]!.slice(-2)).toEqual(['finalNorm', 'vocabulary']);
    expect(namesOf(smallShapes.find(([name]) => name === 'llama value head')![1])[1]!.slice(-3)).toEqual([
      'finalNorm',
      'scalarHead',
      'scalarHeadBias',
    ]);
  });

  test('data replicas hold the same', () => {
    const degrees = { pipeline: 2, tensor: 2, data: 3 };
    const strip = (table: ShardTensor[]) => table.map(({ copies, ...tensor }) => tensor);
    for (const rank of [0, 1, 2, 3]) {
      const first = shardTable(rotary(), parts, degrees, rank);
      const third = shardTable(rotary(), parts, degrees, rank + 8);
      expect(strip(third)).toEqual(strip(first));
      const shifted = (copies: readonly Copies[]) => copies.map((c) => ({ ...c, ranks: c.ranks.map((r) => r + 8) }));
      expect(third.map(({ copies }) => copies)).toEqual(first.map(({ copies }) => shifted(copies)));
    }
  });

  test('degrees that cannot be are refused with what to use', () => {
    const shardsOf = (pipeline: number, tensor: number, partCount = parts) =>
      shardTable(rotary(), partCount, { pipeline, tensor, data: 1 }, 0);
    expect(() => shardsOf(1, 3)).toThrow(/parallel\.tensor: 3 .* numerics\.parts 8: .* power of two up to 8/);
    expect(() => shardsOf(1, 4, 2)).toThrow(/parallel\.tensor: 4 .* up to 2\. Lower it, or raise numerics\.parts/);
    expect(() => shardsOf(4, 1)).toThrow(/4 stages .* 3 layers/);
    for (const [pipeline, tensor] of [
      [1, 3],
      [1, 16],
      [4, 1],
      [0, 1],
      [1, 0],
    ]) {
      expect(() => shardsOf(pipeline!, tensor!)).toThrow(expect.objectContaining({ code: 'PARALLEL_INVALID' }));
    }
  });
});

const layerNorms = (layer: number) =>
  ['norm1', 'norm1Bias', 'norm2', 'norm2Bias'].map((name) => `layers.${layer}.${name}`);
