import { describe, expect, test } from 'vitest';
import { parseModelConfig, withHead } from '../../src/layout/config.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { defaultParts, resolveParts, vocabularyParts } from '../../src/layout/parts.js';
import { packedElements, type TensorSpec, tensorTable } from '../../src/layout/tensor-table.js';

type Json = Record<string, unknown>;

const rotary = (more: Json = {}): ModelShape =>
  parseModelConfig(
    {
      model_type: 'llama',
      vocab_size: 331,
      hidden_size: 64,
      intermediate_size: 192,
      num_hidden_layers: 2,
      num_attention_heads: 8,
      num_key_value_heads: 2,
      max_position_embeddings: 64,
      ...more,
    },
    'config.json',
  );
const gpt2 = (more: Json = {}): ModelShape =>
  parseModelConfig(
    { model_type: 'gpt2', vocab_size: 97, n_embd: 32, n_layer: 2, n_head: 4, n_positions: 16, ...more },
    'config.json',
  );

const shapes: [string, ModelShape][] = [
  ['llama', rotary()],
  ['llama with biases, tied', rotary({ attention_bias: true, mlp_bias: true, tie_word_embeddings: true })],
  ['qwen2', rotary({ model_type: 'qwen2' })],
  ['qwen3 with a head width of its own', rotary({ model_type: 'qwen3', head_dim: 20, num_key_value_heads: 8 })],
  ['gpt2', gpt2()],
  ['llama value head', withHead(rotary(), 'value')],
  ['gpt2 score head', withHead(gpt2(), 'score')],
];
const cases = shapes.flatMap(([name, shape]) => [1, 2, 4].map((parts) => [name, parts, shape] as const));

const find = (table: TensorSpec[], name: string): TensorSpec => {
  const spec = table.find((candidate) => candidate.name === name);
  if (!spec) throw new Error(`no ${name}`);
  return spec;
};
const rowsInSource = (spec: TensorSpec, index: number) => {
  const { shape, transposed } = spec.sources[index]!;
  return (transposed ? shape[1] : shape[0])!;
};

describe('the tensor table', () => {
  test.each(cases)(
    '%s, %i parts: pieces are a bijection between rows of the sources and rows of the tensor',
    (_, parts, shape) => {
      for (const spec of tensorTable(shape, parts)) {
        const rows = new Uint8Array(spec.out);
        for (const [index, source] of spec.sources.entries()) {
          const sourceRows = new Uint8Array(rowsInSource(spec, index));
          for (const piece of source.pieces) {
            for (let i = 0; i < piece.rows; i++) {
              rows[piece.row + i]!++;
              sourceRows[piece.sourceRow + i]!++;
            }
          }
          expect(sourceRows.every((count) => count === 1)).toBe(true);
          const columns = source.shape.reduce((a, b) => a * b, 1) / sourceRows.length;
          expect(columns).toBe(spec.in);
        }
        expect(rows.every((count) => count === 1)).toBe(true);
      }
    },
  );

  test.each(cases)('%s, %i parts: part sizes add up, elements hold every part padded', (_, parts, shape) => {
    for (const spec of tensorTable(shape, parts)) {
      const total = spec.sizes.reduce((a, b) => a + b, 0);
      expect(total).toBe(spec.split === 'in' ? spec.in : spec.out);
      expect(spec.sizes.length).toBe(spec.split === 'none' ? 1 : parts);
      const packed = (size: number) =>
        spec.split === 'in' ? packedElements(spec.out, size) : packedElements(size, spec.in);
      const expected = spec.kind === 'vector' ? spec.out * spec.in : spec.sizes.map(packed).reduce((a, b) => a + b, 0);
      expect(spec.elements).toBe(expected);
      expect(spec.elements).toBeGreaterThanOrEqual(spec.out * spec.in);
    }
  });

  test.each(cases)('%s, %i parts: decay is for tensors of two dimensions, names are unique', (_, parts, shape) => {
    const table = tensorTable(shape, parts);
    for (const spec of table) expect(spec.decay).toBe(spec.sources.every((source) => source.shape.length === 2));
    for (const names of [table.map((spec) => spec.name), table.flatMap((spec) => spec.sources.map((s) => s.name))]) {
      expect(new Set(names).size).toBe(names.length);
    }
  });

  test('a part of qkv holds its query heads, then key heads, then value heads', () => {
    const pieces = (heads: number, groups: number, parts: number) => {
      const shape = rotary({ num_attention_heads: heads, num_key_value_heads: groups, head_dim: 10 });
      const qkv = find(tensorTable(shape, parts), 'layers.0.qkv');
      return { sizes: qkv.sizes, pieces: qkv.sources.map((source) => source.pieces) };
    };
    // Two key/value heads per two parts: each part owns one.
    expect(pieces(4, 2, 2)).toEqual({
      sizes: [40, 40],
      pieces: [
        [
          { sourceRow: 0, rows: 20, row: 0 },
          { sourceRow: 20, rows: 20, row: 40 },
        ],
        [
          { sourceRow: 0, rows: 10, row: 20 },
          { sourceRow: 10, rows: 10, row: 60 },
        ],
        [
          { sourceRow: 0, rows: 10, row: 30 },
          { sourceRow: 10, rows: 10, row: 70 },
        ],
      ],
    });
    // Fewer key/value heads than parts: the first part of each group owns the head.
    expect(pieces(4, 2, 4)).toEqual({
      sizes: [30, 10, 30, 10],
      pieces: [
        [
          { sourceRow: 0, rows: 10, row: 0 },
          { sourceRow: 10, rows: 20, row: 30 }, // the rows of parts 1 and 2 are neighbours
          { sourceRow: 30, rows: 10, row: 70 },
        ],
        [
          { sourceRow: 0, rows: 10, row: 10 },
          { sourceRow: 10, rows: 10, row: 50 },
        ],
        [
          { sourceRow: 0, rows: 10, row: 20 },
          { sourceRow: 10, rows: 10, row: 60 },
        ],
      ],
    });
  });

  test('GPT-2 stacks q, k and v in one transposed tensor, its bias in the same row order', () => {
    const table = tensorTable(gpt2(), 2);
    const qkv = find(table, 'layers.1.qkv');
    expect(qkv.sources).toHaveLength(1);
    expect(qkv.sources[0]).toMatchObject({
      name: 'transformer.h.1.attn.c_attn.weight',
      shape: [32, 96],
      transposed: true,
    });
    expect(qkv.sources[0]!.pieces).toEqual([
      { sourceRow: 0, rows: 16, row: 0 },
      { sourceRow: 32, rows: 16, row: 16 },
      { sourceRow: 64, rows: 16, row: 32 },
      { sourceRow: 16, rows: 16, row: 48 },
      { sourceRow: 48, rows: 16, row: 64 },
      { sourceRow: 80, rows: 16, row: 80 },
    ]);
    const bias = find(table, 'layers.1.qkvBias');
    expect(bias.sources[0]).toMatchObject({ name: 'transformer.h.1.attn.c_attn.bias', shape: [96], transposed: false });
    expect(bias.sources[0]!.pieces).toEqual(qkv.sources[0]!.pieces);
  });

  test('a part of the SwiGLU matrix holds gate rows, then up rows', () => {
    const up = find(tensorTable(rotary(), 2), 'layers.0.up');
    expect(up.sizes).toEqual([192, 192]);
    expect(up.sources.map((source) => source.pieces)).toEqual([
      [
        { sourceRow: 0, rows: 96, row: 0 },
        { sourceRow: 96, rows: 96, row: 192 },
      ],
      [
        { sourceRow: 0, rows: 96, row: 96 },
        { sourceRow: 96, rows: 96, row: 288 },
      ],
    ]);
  });

  test('a tied embedding is the only vocabulary matrix; an untied one is not tied; classifiers have neither', () => {
    const names = (shape: ModelShape) => tensorTable(shape, 1).map((spec) => spec.name);
    const tied = tensorTable(rotary({ tie_word_embeddings: true }), 1);
    expect(find(tied, 'embed').tied).toBe(true);
    expect(tied.some((spec) => spec.name === 'vocabulary')).toBe(false);
    expect(find(tensorTable(rotary(), 1), 'embed').tied).toBe(false);
    expect(names(rotary()).at(-1)).toBe('vocabulary');
    expect(names(withHead(rotary(), 'value')).slice(-2)).toEqual(['scalarHead', 'scalarHeadBias']);
    expect(names(withHead(rotary(), 'score')).at(-1)).toBe('scalarHead');
  });

  test('classifier tensors carry the names of transformers', () => {
    const heads = (shape: ModelShape) =>
      tensorTable(shape, 1)
        .filter((spec) => spec.name.startsWith('scalarHead'))
        .flatMap((spec) => spec.sources.map((source) => source.name));
    expect(heads(withHead(rotary(), 'value'))).toEqual(['score.weight', 'score.bias']);
    expect(heads(withHead(rotary(), 'score'))).toEqual(['score.weight']);
    expect(heads(withHead(gpt2(), 'value'))).toEqual(['classifier.weight', 'classifier.bias']);
    expect(heads(withHead(gpt2(), 'score'))).toEqual(['score.weight']);
  });

  test('packing: panels of 64 rows, the last one up to 16, columns up to even', () => {
    expect(packedElements(64, 10)).toBe(640);
    expect(packedElements(65, 10)).toBe(800);
    expect(packedElements(1, 9)).toBe(160);
    expect(packedElements(130, 3)).toBe((128 + 16) * 4);
    expect(packedElements(0, 10)).toBe(0);
  });
});

describe('parts', () => {
  const sized = (heads: number, groups: number, headWidth: number, feedForward: number) =>
    rotary({
      num_attention_heads: heads,
      num_key_value_heads: groups,
      head_dim: headWidth,
      intermediate_size: feedForward,
    });

  test('the default is the largest power of two up to 8 that leaves sums of 128 terms', () => {
    expect(defaultParts(sized(8, 8, 64, 1408))).toBe(4);
    expect(defaultParts(sized(16, 8, 128, 8192))).toBe(8);
    expect(defaultParts(sized(32, 32, 128, 11008))).toBe(8);
    expect(defaultParts(sized(14, 2, 64, 4864))).toBe(2);
    expect(defaultParts(sized(12, 12, 64, 2048))).toBe(4);
    expect(defaultParts(sized(4, 2, 16, 176))).toBe(1);
    expect(defaultParts(sized(12, 3, 128, 4096))).toBe(1); // 3 key/value heads fit no power of two
  });

  test('a requested number is taken when the model allows it', () => {
    const shape = sized(8, 2, 16, 192);
    expect([1, 2, 4, 8].map((parts) => resolveParts(shape, parts))).toEqual([1, 2, 4, 8]);
    expect(resolveParts(shape)).toBe(defaultParts(shape));
  });

  test.each<[number, ModelShape, RegExp]>([
    [3, sized(6, 6, 16, 96), /power of two/],
    [0, sized(6, 6, 16, 96), /power of two/],
    [1.5, sized(6, 6, 16, 96), /power of two/],
    [4, sized(6, 6, 16, 96), /6 attention heads/],
    [8, sized(8, 8, 16, 100), /feed-forward width 100/],
    [4, sized(12, 6, 16, 96), /6 key\/value heads/],
  ])('%d parts are refused with the reason', (parts, shape, reason) => {
    expect(() => resolveParts(shape, parts)).toThrow(expect.objectContaining({ code: 'PARTS_INVALID' }));
    expect(() => resolveParts(shape, parts)).toThrow(reason);
  });

  test('vocabulary parts cover V in order, the last ones smaller or empty', () => {
    expect(vocabularyParts(331, 4)).toEqual([83, 83, 83, 82]);
    expect(vocabularyParts(10, 8)).toEqual([2, 2, 2, 2, 2, 0, 0, 0]);
    expect(vocabularyParts(320, 1)).toEqual([320]);
  });
});
