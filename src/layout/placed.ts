/** Where the tensors of a shard lie in one of its rank's arenas, down to runs of rows (native/kernels/weight.h). */
import { type Dtype, planModel, type TensorPlace } from './memory-plan.js';
import { blockElements, type ShardTensor } from './shards.js';
import type { Range } from './stages.js';

/** Which copy of the parameters: all but the weights are float32, in the float32 order. */
export type Space = Exclude<keyof TensorPlace, 'gradient2'>;

export interface PlacedTensor {
  tensor: ShardTensor;
  /** Bytes from the beginning of the arena. */
  offset: number;
  elementBytes: 2 | 4;
}

export interface PlacedShard {
  /** Those that have such a copy. */
  tensors: readonly PlacedTensor[];
  /** Bytes of the arena: alignment, and for masters and moments each other's places, included. */
  arenaBytes: number;
}

/** Of bytes: those of rows that one rank of a training replica holds, and those of rows that the layout replicates. */
export interface ByteCount {
  sharded: number;
  replicated: number;
}

const panel = 64;
const panelGrain = 16;
/** A row of a panel takes 4 bytes in each run: one float32, or a pair of bfloat16. */
const runRowBytes = 4;

export function placeShard(table: readonly ShardTensor[], dtype: Dtype, space: Space = 'weights'): PlacedShard {
  const plan = planModel(table, dtype, space !== 'weights');
  const arenas = { weights: plan.weightsBytes, gradient: plan.gradientBytes };
  const tensors = table.flatMap((tensor, index): PlacedTensor[] => {
    const offset = plan.places[index]?.[space];
    if (offset === undefined) return [];
    const half = space === 'weights' && dtype === 'bfloat16' && tensor.kind === 'matrix';
    return [{ tensor, offset, elementBytes: half ? 2 : 4 }];
  });
  return { tensors, arenaBytes: arenas[space as keyof typeof arenas] ?? plan.optimizerBytes };
}

/** Byte offsets in the arena of a tensor's blocks, and after them the tensor's end. */
export function blockOffsets({ tensor, offset, elementBytes }: PlacedTensor): number[] {
  const offsets = [offset];
  let end = offset;
  for (const block of tensor.blocks) {
    end += blockElements(tensor, block) * elementBytes;
    offsets.push(end);
  }
  return offsets;
}

/** Bytes of each block, padding included. What the rows that others hold too add to it is replicated. */
export function blockBytes({ tensor, elementBytes }: PlacedTensor): ByteCount[] {
  let row = 0;
  return tensor.blocks.map((block) => {
    const all = blockElements(tensor, block) * elementBytes;
    const rows = block.rows.reduce((sum, { begin, end }) => sum + end - begin, 0);
    const copied = tensor.copies.reduce((sum, { begin, end }) => sum + overlap({ begin, end }, row, rows), 0);
    row += rows;
    const alone = { rows: [{ begin: 0, end: rows - copied }], columns: block.columns };
    const sharded = blockElements(tensor, alone) * elementBytes;
    return { sharded, replicated: all - sharded };
  });
}

export function tensorBytes(placed: PlacedTensor): ByteCount {
  return addBytes(blockBytes(placed));
}

export function addBytes(counts: readonly ByteCount[]): ByteCount {
  return {
    sharded: counts.reduce((sum, { sharded }) => sum + sharded, 0),
    replicated: counts.reduce((sum, { replicated }) => sum + replicated, 0),
  };
}

function overlap(range: Range, begin: number, count: number): number {
  return Math.max(0, Math.min(range.end, begin + count) - Math.max(range.begin, begin));
}

/** Rows of a block that lie in runs of equal length at equal distances. */
export interface Runs {
  rows: number;
  /** Bytes from the block's beginning to the first run, from run to run, and of a run. */
  offset: number;
  stride: number;
  bytes: number;
  count: number;
}

/**
 * The runs of rows that begin with `row` of block `index` and end after at most `limit` rows or with the panel. A matrix has one
 * run per column (bfloat16: per two columns) in each panel; a vector lies in one piece.
 */
export function runsOfRows({ tensor, elementBytes }: PlacedTensor, index: number, row: number, limit: number): Runs {
  const { rows: ranges, columns } = tensor.blocks[index] as ShardTensor['blocks'][number];
  const width = columns.end - columns.begin;
  if (tensor.kind === 'vector') {
    const bytes = limit * width * elementBytes;
    return { rows: limit, offset: row * width * elementBytes, stride: bytes, bytes, count: 1 };
  }
  const total = ranges.reduce((sum, { begin, end }) => sum + end - begin, 0);
  const first = Math.floor(row / panel) * panel;
  const panelWidth = Math.min(panel, Math.ceil((total - first) / panelGrain) * panelGrain);
  const paddedColumns = Math.ceil(width / 2) * 2;
  const rows = Math.min(limit, first + panel - row);
  return {
    rows,
    offset: first * paddedColumns * elementBytes + (row - first) * runRowBytes,
    stride: panelWidth * runRowBytes,
    bytes: rows * runRowBytes,
    count: (paddedColumns * elementBytes) / runRowBytes,
  };
}
