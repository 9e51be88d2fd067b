/**
 * Device memory that a rank on a GPU takes beside its arenas, as upper bounds: scratch of operations, index arrays, tables, what graphs
 * keep, addends of sums across ranks, and what is lost because memory comes in pages. The sizes are those of native/cuda/queue.h,
 * native/kernels/cuda and native/comm/nccl; whole runs on emulated GPUs that have no byte more hold them together (test).
 */
import { type Dtype, pagePositions } from './memory-plan.js';
import type { ModelShape } from './model-shape.js';
import type { Degrees } from './parallel.js';

const MiB = 2 ** 20;
/** Device memory is given in such pages. */
export const gpuPageBytes = 2 * MiB;

/** linear.cu, kScratchBytes; attention_few.cu, kMostBytes. */
const linearScratchBytes = 64 * MiB;
const fewScratchBytes = 128 * MiB;
/** cuda.h and product.h: blocks that join parts at the same time, and the side of a block. */
const joiningBlocks = 2 * 132;
const tileSide = 128;
/** optimizer.cu, kMostBlocks. */
const squaresBytes = 2 ** 19;
/** attention.h, kFewRows. */
const fewRows = 16;
/** queue.h. */
const graphBytes = MiB;
const mostGraphs = 64;
const regionBytes = 4 * MiB;
/** nccl.cpp, kChunk: floats of a rank that wait to be summed. */
const addendBytes = 4 * MiB;

/** The largest of each that calls of a model have. */
export interface GpuCall {
  rows: number;
  sequences: number;
  train: boolean;
  /** Decodes, by graphs. */
  generates: boolean;
}

const roundUp = (x: number, to: number): number => Math.ceil(x / to) * to;
const inPages = (bytes: number): number => roundUp(bytes, gpuPageBytes);
const pagesOfSequence = (s: ModelShape): number => Math.ceil(s.maxPositions / pagePositions) + 1;

/** Of a model's share on one rank, of which `parts` are its own. */
export interface GpuShare {
  shape: ModelShape;
  parts: number;
  dtype: Dtype;
}

/** One block of a queue, which its operations use in turn. */
export function gpuScratchBytes(share: GpuShare, call: GpuCall): number {
  const { shape: s, parts, dtype } = share;
  const { rows, sequences, train } = call;
  const up = (s.activation === 'swiglu' ? 2 : 1) * s.feedForward;
  // Parts are joined where a weight is cut along the other side than the width.
  const blocks = Math.min(joiningBlocks, Math.ceil(rows / tileSide) * Math.ceil(s.width / tileSide));
  const joining = Math.ceil(Math.log2(parts)) * blocks * tileSide * tileSide * 4;
  const inTurn = (bytesOfRow: number): number => Math.min(rows * bytesOfRow, Math.max(linearScratchBytes, bytesOfRow));
  const statistics = rows * (32 + 12 * parts);
  const sampling =
    sequences * (8 + 16 * parts + 4 * Math.ceil(Math.max(1, s.vocabulary) / 256)) * (call.generates ? 1 : 0);
  const largest = Math.max(s.vocabulary, up, s.heads * s.headWidth, s.maxPositions) * Math.max(s.width, s.feedForward);
  const backward = [
    rows * s.heads * 4 + 256 + (parts > s.keyValueHeads ? rows * parts * 2 * s.headWidth * 4 : 0),
    s.headNorm ? rows * (s.heads + s.keyValueHeads) * 4 : 0,
    // Of sumsOfSquares: a float64 for 4096 elements, at the most, and for many runs together.
    Math.max(Math.ceil(largest / 4096) * 8, squaresBytes),
  ];
  const all = [joining, inTurn(parts * s.width * 4), inTurn(up * 4), statistics, sampling, ...(train ? backward : [])];
  return inPages(Math.max(...all, dtype === 'bfloat16' ? fewBytes(s, sequences) : 0));
}

/** Attention of few rows (attention_few.cu): tiles at a time, of all pages that they may see. */
function fewBytes(s: ModelShape, sequences: number): number {
  const halves = 2;
  const ofPage = 4 * (fewRows * pagePositions + (pagePositions / 2) * 8 * halves + fewRows);
  const units = s.keyValueHeads * Math.ceil(s.heads / s.keyValueHeads / fewRows);
  const ofTile = units * (pagesOfSequence(s) * ofPage + 4 * fewRows);
  return Math.min(sequences * ofTile, Math.max(fewScratchBytes, ofTile));
}

/** Two regions for index arrays of operations: of a call's rows, pages of its sequences, panels of a weight. */
export function gpuArrayBytes({ shape: s, parts }: GpuShare, { rows, sequences }: GpuCall): number {
  const panels = (Math.ceil(Math.max(s.vocabulary, 2 * s.feedForward, s.width) / 64) + parts) * 2;
  const largest = Math.max(rows * 40, sequences * pagesOfSequence(s) * 4, sequences * 64, panels * 40);
  return 2 * inPages(Math.max(regionBytes, 2 * largest));
}

/** Of every model: its rotary tables, and the rows of queries whose keys and values other ranks have, too, while gradients end. */
export function gpuTableBytes({ shape: s }: GpuShare, keyValueRanks: number, train: boolean): number {
  const tables = s.positions.type === 'rope' ? inPages(s.maxPositions * s.headWidth * 4) : 0;
  return tables + (train && keyValueRanks > 1 ? inPages(s.heads * s.headWidth * s.width * 4) : 0);
}

/** What decoding keeps: a graph for every number of sequences and of their pages. */
export function gpuGraphBytes({ shape }: GpuShare, { sequences, generates }: GpuCall): number {
  return generates ? inPages(Math.min(mostGraphs, sequences * pagesOfSequence(shape)) * graphBytes) : 0;
}

/** Addends of sums across ranks of a model: every group that sums has room for a piece of each of its ranks. */
export function gpuAddendBytes({ pipeline, tensor, data }: Degrees, keyValueRanks: number, tied: boolean): number {
  // Replicas sum in step and behind the computation.
  const groups = [tensor, data, data, keyValueRanks, tied && pipeline > 1 ? 2 : 1];
  return groups.filter((ranks) => ranks > 1).reduce((sum, ranks) => sum + ranks * addendBytes, 0);
}
