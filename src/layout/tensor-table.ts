/**
 * The tensor table: every parameter of a model once, how it lies in memory (native/kernels/weight.h) and which rows of which
 * Hugging Face tensors it is made of. Loading, saving, resharding and the memory plan read this one table.
 */
import { type CheckpointNames, checkpointNames } from './checkpoint-names.js';
import type { ModelShape } from './model-shape.js';
import { vocabularyParts } from './parts.js';

/** Rows sourceRow .. sourceRow + rows - 1 of a checkpoint tensor are rows row .. row + rows - 1 of the engine's tensor. */
export interface Piece {
  sourceRow: number;
  rows: number;
  row: number;
}

export interface TensorSource {
  /** Name in the checkpoint, and its shape there. */
  name: string;
  shape: readonly number[];
  /** Stored [in, out] (GPT-2's Conv1D): rows of `pieces` are its columns. */
  transposed: boolean;
  pieces: readonly Piece[];
  /** Columns begin .. begin + count - 1 of those rows are the engine's columns 0 .. count - 1; absent: all columns. */
  columns?: { begin: number; count: number };
}

export interface TensorSpec {
  name: string;
  /** A matrix lies packed, panel by panel, in the compute dtype; a vector as plain row-major [out, in] float32. */
  kind: 'matrix' | 'vector';
  out: number;
  in: number;
  split: 'none' | 'out' | 'in';
  /** Rows (split out; of a vector too) or columns (split in) of each part; one entry, `out`, where there is no split. */
  sizes: readonly number[];
  /** Elements in memory, padding included. */
  elements: number;
  /** AdamW decays it: tensors of two or more dimensions in the checkpoint. */
  decay: boolean;
  /** The embedding is also the vocabulary projection and has a second gradient accumulator for it. */
  tied: boolean;
  sources: readonly TensorSource[];
}

const panel = 64;
const panelGrain = 16;
const roundUp = (x: number, to: number) => Math.ceil(x / to) * to;

/** Elements of a packed part [out, in]: panels of 64 rows, the last one rounded up to 16; columns rounded up to even. */
export function packedElements(out: number, columns: number): number {
  if (out === 0) return 0;
  const panels = Math.ceil(out / panel);
  const last = out - (panels - 1) * panel;
  return ((panels - 1) * panel + roundUp(last, panelGrain)) * roundUp(columns, 2);
}

/** One block of rows of the engine's tensor: which source it comes from, and from which row. */
interface Block {
  source: number;
  sourceRow: number;
  rows: number;
}

/** Rows of the qkv projection, part by part: query heads, key heads, value heads (QkvLayout of native/kernels/kernels.h). */
function qkvParts(shape: ModelShape, parts: number): Block[][] {
  const { heads, keyValueHeads, headWidth } = shape;
  const stacked = shape.family === 'gpt2';
  const offsets = stacked ? [0, heads, heads + keyValueHeads] : [0, 0, 0];
  return Array.from({ length: parts }, (_, part) => {
    const owners = Math.min(parts, keyValueHeads);
    const owns = part % (parts / owners) === 0;
    const count = owns ? keyValueHeads / owners : 0;
    const first = Math.floor((part * keyValueHeads) / parts);
    const ranges = [
      { first: (part * heads) / parts, count: heads / parts },
      { first, count },
      { first, count },
    ];
    return ranges
      .map((range, which) => ({
        source: stacked ? 0 : which,
        sourceRow: ((offsets[which] as number) + range.first) * headWidth,
        rows: range.count * headWidth,
      }))
      .filter((block) => block.rows > 0);
  });
}

/** Rows of the MLP's first projection: part p holds F / P gate rows, then F / P up rows; a plain MLP has one matrix. */
function upParts(shape: ModelShape, parts: number): Block[][] {
  const rows = shape.feedForward / parts;
  const sources = shape.activation === 'swiglu' ? [0, 1] : [0];
  return Array.from({ length: parts }, (_, part) =>
    sources.map((source) => ({ source, sourceRow: part * rows, rows })),
  );
}

/** Pieces of each source, from the blocks in the order of the engine's rows; neighbours on both sides are joined. */
function piecesOf(blocks: readonly Block[], sources: number): Piece[][] {
  const pieces: Piece[][] = Array.from({ length: sources }, () => []);
  let row = 0;
  for (const { source, sourceRow, rows } of blocks) {
    const list = pieces[source] as Piece[];
    const last = list.at(-1);
    if (last && last.sourceRow + last.rows === sourceRow && last.row + last.rows === row) last.rows += rows;
    else list.push({ sourceRow, rows, row });
    row += rows;
  }
  return pieces;
}

const rowsOf = (blocks: readonly Block[]) => blocks.reduce((sum, block) => sum + block.rows, 0);

/** Builds specs for one model; each method returns one or more entries of the table. */
class TableBuilder {
  private readonly names: CheckpointNames;
  private readonly transposed: boolean;

  constructor(
    private readonly shape: ModelShape,
    private readonly parts: number,
  ) {
    this.names = checkpointNames(shape);
    this.transposed = shape.family === 'gpt2';
  }

  build(): TensorSpec[] {
    const { shape, names } = this;
    const table = [this.plainMatrix('embed', names.embed, shape.vocabulary, shape.tied)];
    if (shape.positions.type === 'learned') table.push(this.positionTable());
    for (let layer = 0; layer < shape.layers; layer++) table.push(...this.layer(layer));
    table.push(...this.norm('finalNorm', names.finalNorm));
    if (shape.head !== 'language') table.push(...this.scalarHead());
    else if (!shape.tied) table.push(this.plainMatrix('vocabulary', names.vocabulary, shape.vocabulary, false));
    return table;
  }

  private layer(index: number): TensorSpec[] {
    const { shape, parts } = this;
    const names = this.names.layer(index);
    const at = `layers.${index}.`;
    const qkv = qkvParts(shape, parts);
    const up = upParts(shape, parts);
    const table = [
      ...this.norm(`${at}norm1`, names.norm1),
      ...this.splitOut(`${at}qkv`, names.qkv, qkv, shape.qkvBias),
    ];
    if (shape.headNorm) {
      table.push(this.vector(`${at}queryNorm`, `${names.queryNorm}.weight`, shape.headWidth));
      table.push(this.vector(`${at}keyNorm`, `${names.keyNorm}.weight`, shape.headWidth));
    }
    const attended = shape.heads * shape.headWidth;
    table.push(
      ...this.splitIn(`${at}attentionOut`, names.attentionOut, attended, shape.outputBias),
      ...this.norm(`${at}norm2`, names.norm2),
      ...this.splitOut(`${at}up`, names.up, up, shape.mlpBias),
      ...this.splitIn(`${at}down`, names.down, shape.feedForward, shape.mlpBias),
    );
    return table;
  }

  /** [V, D], cut by vocabulary parts. */
  private plainMatrix(name: string, source: string, rows: number, tied: boolean): TensorSpec {
    const { width } = this.shape;
    const sizes = vocabularyParts(rows, this.parts);
    return {
      name,
      kind: 'matrix',
      out: rows,
      in: width,
      split: 'out',
      sizes,
      elements: sizes.reduce((sum, size) => sum + packedElements(size, width), 0),
      decay: true,
      tied,
      sources: [whole(`${source}.weight`, [rows, width])],
    };
  }

  private positionTable(): TensorSpec {
    const { maxPositions, width } = this.shape;
    const table = this.vector('positions', `${this.names.positions}.weight`, maxPositions);
    const sources = [whole(`${this.names.positions}.weight`, [maxPositions, width])];
    return { ...table, in: width, elements: maxPositions * width, decay: true, sources };
  }

  /** A matrix whose rows are cut into parts, from one or more checkpoint tensors, and its bias in the same row order. */
  private splitOut(name: string, sources: readonly string[], parts: Block[][], bias: boolean): TensorSpec[] {
    const { width } = this.shape;
    const blocks = parts.flat();
    const out = rowsOf(blocks);
    const sizes = parts.map(rowsOf);
    const pieces = piecesOf(blocks, sources.length);
    const rowsOfSource = (index: number) => (pieces[index] as Piece[]).reduce((sum, piece) => sum + piece.rows, 0);
    const source = (suffix: string, shapeOf: (rows: number) => number[], transposed: boolean): TensorSource[] =>
      sources.map((base, index) => ({
        name: base + suffix,
        shape: shapeOf(rowsOfSource(index)),
        transposed,
        pieces: pieces[index] as Piece[],
      }));
    const matrix: TensorSpec = {
      name,
      kind: 'matrix',
      out,
      in: width,
      split: 'out',
      sizes,
      elements: sizes.reduce((sum, size) => sum + packedElements(size, width), 0),
      decay: true,
      tied: false,
      sources: source('.weight', (rows) => (this.transposed ? [width, rows] : [rows, width]), this.transposed),
    };
    if (!bias) return [matrix];
    const biasSources = source('.bias', (rows) => [rows], false);
    return [matrix, { ...this.vector(`${name}Bias`, '', out), split: 'out', sizes, sources: biasSources }];
  }

  /** [D, columns], cut along columns; its bias is added once, after the sum over parts. */
  private splitIn(name: string, source: string, columns: number, bias: boolean): TensorSpec[] {
    const { width } = this.shape;
    const size = columns / this.parts;
    const shape = this.transposed ? [columns, width] : [width, columns];
    const matrix: TensorSpec = {
      name,
      kind: 'matrix',
      out: width,
      in: columns,
      split: 'in',
      sizes: new Array<number>(this.parts).fill(size),
      elements: this.parts * packedElements(width, size),
      decay: true,
      tied: false,
      sources: [
        {
          name: `${source}.weight`,
          shape,
          transposed: this.transposed,
          pieces: [{ sourceRow: 0, rows: width, row: 0 }],
        },
      ],
    };
    return bias ? [matrix, this.vector(`${name}Bias`, `${source}.bias`, width)] : [matrix];
  }

  private norm(name: string, source: string): TensorSpec[] {
    const gain = this.vector(name, `${source}.weight`, this.shape.width);
    return this.shape.norm === 'rms' ? [gain] : [gain, this.vector(`${name}Bias`, `${source}.bias`, this.shape.width)];
  }

  private scalarHead(): TensorSpec[] {
    const { width, headBias } = this.shape;
    const weight: TensorSpec = {
      name: 'scalarHead',
      kind: 'matrix',
      out: 1,
      in: width,
      split: 'none',
      sizes: [1],
      elements: packedElements(1, width),
      decay: true,
      tied: false,
      sources: [whole(`${this.names.head}.weight`, [1, width])],
    };
    return headBias ? [weight, this.vector('scalarHeadBias', `${this.names.head}.bias`, 1)] : [weight];
  }

  private vector(name: string, source: string, length: number): TensorSpec {
    return {
      name,
      kind: 'vector',
      out: length,
      in: 1,
      split: 'none',
      sizes: [length],
      elements: length,
      decay: false,
      tied: false,
      sources: [whole(source, [length])],
    };
  }
}

function whole(name: string, shape: readonly number[]): TensorSource {
  const rows = shape[0] as number;
  return { name, shape, transposed: false, pieces: [{ sourceRow: 0, rows, row: 0 }] };
}

/**
 * All tensors of a model, in the order of its forward pass. `parts` comes from `resolveParts`.
 *
 * Names: `embed` [V, D], `positions` [positions, D]; per layer i `layers.i.` + `norm1`, `qkv`, `queryNorm`, `keyNorm`,
 * `attentionOut`, `norm2`, `up`, `down`; `finalNorm`; `vocabulary` [V, D] of an untied language model; `scalarHead` [1, D] of a
 * value or score head. A bias carries the name of its tensor and `Bias`.
 */
export function tensorTable(shape: ModelShape, parts: number): TensorSpec[] {
  return new TableBuilder(shape, parts).build();
}
