/**
 * Where every byte of a model lies, computed before anything is allocated. The addon receives these plans, checks them
 * against what it needs, and its arenas' high-water marks equal them (test).
 *
 * A model has three arenas of its own (weights, gradients, optimizer); activations, keys and values and staging lie in the
 * workspace of the device, which the calls of all its models use in turn.
 */
import type { ModelShape } from './model-shape.js';
import type { RankShare } from './rank-share.js';
import type { TensorSpec } from './tensor-table.js';
import { pieceBoundaries } from './zero.js';

export type Dtype = 'float32' | 'bfloat16';

/** Byte offsets of a tensor's copies in the arenas; an absent copy has no key. */
export interface TensorPlace {
  weights: number;
  master?: number;
  gradient?: number;
  gradient2?: number;
  moment1?: number;
  moment2?: number;
}

export interface ModelPlan {
  places: TensorPlace[];
  weightsBytes: number;
  gradientBytes: number;
  optimizerBytes: number;
}

/**
 * Of the data-parallel ranks, which this one is. It keeps its pieces only: of the optimizer state from ZeRO stage 1 on, of the
 * gradients from 2 on, of the compute weights in 3.
 */
export interface ZeroShare {
  stage: number;
  rank: number;
  ranks: number;
}

/** Buffers of one call in the workspace, in native form. */
export interface CallPlan {
  names: string[];
  offsets: number[];
  bytes: number[];
  total: number;
}

/** How many rows, sequences and pages a call has. Build it with `wholeSequences`. */
export interface CallSize {
  rows: number;
  pages: number;
}

/** How many rows of logits are computed at a time: as many as neither bound forbids, at least 16. No bit depends on it. */
export interface LogitBlock {
  rows: number;
  /** Of the staging memory: the logits and, for backward in bfloat16, their gradients as an operand. */
  bytes: number;
}

/** Of a CPU: large enough for full-speed products, small enough to stay near the caches. */
export const cpuLogits: LogitBlock = { rows: Number.POSITIVE_INFINITY, bytes: 8 << 20 };
/**
 * Of a GPU: 8 tiles of 128 rows, which with the 16 tiles of a width of 2048 give about every multiprocessor of a large GPU one
 * tile of the hidden states' gradient. The bytes are enough for that with 128k tokens (llama 3: 751.5 MiB).
 */
export const gpuLogits: LogitBlock = { rows: 1024, bytes: 768 << 20 };

/** What of a rank decides its buffers besides the shape: its share of the model, and what it computes on. */
export type Place = Pick<RankShare, 'tensorRanks' | 'lastStage'> &
  Partial<Pick<RankShare, 'logitColumns' | 'keyValueRanks'>> & {
    /** Default: of a CPU. */
    logits?: LogitBlock;
  };

const alone: Place = { tensorRanks: 1, lastStage: true };

/** Slots for micro-batches whose activations are kept at the same time, each large enough for any of these. */
export interface Slots {
  count: number;
  sizes: readonly CallSize[];
}

export interface TrainingOptions {
  /** Layers keep only their input. */
  recompute?: boolean;
  /** Backward goes through a layer with all micro-batches before it goes on to the next. */
  breadthFirst?: boolean;
  place?: Place;
  /** Bytes before it, for units (units.ts). */
  begin?: number;
  /** Default: one, for this call. */
  slots?: Slots;
  slot?: number;
}
const alignment = 64;
/** Positions of keys and values in a page (kernels.h). */
export const pagePositions = 64;

export const align = (bytes: number): number => Math.ceil(bytes / alignment) * alignment;
const roundUp = (x: number, to: number): number => Math.ceil(x / to) * to;
export const bytesOf = (dtype: Dtype): number => (dtype === 'float32' ? 4 : 2);

const wholeState: ZeroShare = { stage: 0, rank: 0, ranks: 1 };

/** Elements of a tensor that a rank keeps of what is divided among the ranks. */
export function keptElements(tensor: TensorSpec, { rank, ranks }: ZeroShare): number {
  const boundaries = pieceBoundaries(tensor, ranks);
  return (boundaries[rank + 1] as number) - (boundaries[rank] as number);
}

/** Places of all tensors: weights in the compute dtype (vectors float32), and for training gradients, moments and masters. */
export function planModel(
  table: readonly TensorSpec[],
  dtype: Dtype,
  train: boolean,
  zero: ZeroShare = wholeState,
): ModelPlan {
  const plan: ModelPlan = { places: [], weightsBytes: 0, gradientBytes: 0, optimizerBytes: 0 };
  const take = (arena: 'weightsBytes' | 'gradientBytes' | 'optimizerBytes', bytes: number): number => {
    const offset = plan[arena];
    plan[arena] += align(bytes);
    return offset;
  };
  for (const tensor of table) {
    const elements = (dividedFrom: number): number =>
      zero.stage < dividedFrom ? tensor.elements : keptElements(tensor, zero);
    const place: TensorPlace = {
      weights: take('weightsBytes', elements(3) * (tensor.kind === 'matrix' ? bytesOf(dtype) : 4)),
    };
    if (train) {
      // Before the first, which is then next to the gradients that are reduced together with it.
      if (tensor.tied && zero.stage < 2) place.gradient2 = take('gradientBytes', tensor.elements * 4);
      place.gradient = take('gradientBytes', elements(2) * 4);
      const kept = elements(1) * 4;
      if (dtype === 'bfloat16' && tensor.kind === 'matrix') place.master = take('optimizerBytes', kept);
      place.moment1 = take('optimizerBytes', kept);
      place.moment2 = take('optimizerBytes', kept);
    }
    plan.places.push(place);
  }
  return plan;
}

/** Host memory of a copy of what a checkpoint keeps of a model that learns: weights (masters) and both moments, in float32. */
export function snapshotBytes(table: readonly TensorSpec[]): number {
  return table.reduce((sum, { elements }) => sum + 3 * align(elements * 4), 0);
}

/** Rows and pages of whole sequences: each starts at a multiple of `rowGrain` rows and has pages of its own. */
export function wholeSequences(lengths: Iterable<number>, rowGrain = 2): CallSize {
  let rows = 0;
  let pages = 0;
  for (const length of lengths) {
    rows += roundUp(length, rowGrain);
    pages += Math.ceil(length / pagePositions);
  }
  return { rows, pages };
}

/** The largest call that micro-batches of at most `tokens` (even-padded) rows can make, each sequence from a multiple of `rowGrain` on. */
export function largestCall(tokens: number, sequences: number, rowGrain = 2): CallSize {
  const even = roundUp(tokens, 2);
  const most = Math.min(sequences, even / 2);
  return { rows: even + most * (rowGrain - 2), pages: Math.ceil(even / pagePositions) + most };
}

class CallPlanner {
  private readonly plan: CallPlan;

  constructor(begin: number) {
    this.plan = { names: [], offsets: [], bytes: [], total: begin };
  }

  /** The next buffer begins there. */
  seek(offset: number): void {
    this.plan.total = offset;
  }

  add(name: string, bytes: number): void {
    if (bytes === 0) return;
    this.plan.names.push(name);
    this.plan.offsets.push(this.plan.total);
    this.plan.bytes.push(bytes);
    this.plan.total += align(bytes);
  }

  done(): CallPlan {
    return this.plan;
  }
}

const queryColumns = (s: ModelShape): number => s.heads * s.headWidth;
const qkvColumns = (s: ModelShape): number => (s.heads + 2 * s.keyValueHeads) * s.headWidth;
const upColumns = (s: ModelShape): number => (s.activation === 'swiglu' ? 2 : 1) * s.feedForward;

/** Bytes of one page of keys and values in one layer (kernels.h, KvPages). */
export function pageBytes(s: ModelShape, dtype: Dtype): number {
  const key = roundUp(s.headWidth, 2) * pagePositions;
  const value = pagePositions * roundUp(s.headWidth, 16);
  return s.keyValueHeads * (key + value) * bytesOf(dtype);
}

/** A block of logits [rows, V] and, for backward in bfloat16, its gradients as an operand; rows even. */
function stagingBytes(
  s: ModelShape,
  dtype: Dtype,
  rows: number,
  { backward, logits = cpuLogits }: Pick<Place, 'logits'> & { backward: boolean },
): number {
  if (s.head !== 'language') return 0;
  const perRow = roundUp(Math.max(1, s.vocabulary), 16) * (4 + (backward && dtype === 'bfloat16' ? 2 : 0));
  const block = Math.max(16, Math.min(logits.rows, Math.floor(logits.bytes / perRow / 16) * 16));
  return Math.min(roundUp(rows, 2), block) * perRow;
}

type Adding = (name: string, bytes: number) => void;

/** What stays between a micro-batch's forward and its backward. */
function addKept(add: Adding, s: ModelShape, dtype: Dtype, { rows, pages }: CallSize, options: TrainingOptions): void {
  const { recompute = false, breadthFirst = false, place = alone } = options;
  const e = bytesOf(dtype);
  const stat = rows * (s.norm === 'layer' ? 2 : 1) * 4;
  if (breadthFirst) add('dx', rows * s.width * 4);
  for (let l = 0; l <= s.layers; l++) add(`x.${l}`, rows * s.width * 4);
  for (let l = 0; l < s.layers && !recompute; l++)
    addLayer((name, bytes) => add(`${name}.${l}`, bytes), s, dtype, { rows, pages });
  if (!place.lastStage) return;
  add('hidden', rows * s.width * e);
  add('hiddenStat', stat);
}

/** What backward needs of a layer besides its input. */
function addLayer(add: Adding, s: ModelShape, dtype: Dtype, { rows, pages }: CallSize): void {
  const e = bytesOf(dtype);
  const stat = rows * (s.norm === 'layer' ? 2 : 1) * 4;
  add('middle', rows * s.width * 4);
  add('normed1', rows * s.width * e);
  add('normed2', rows * s.width * e);
  add('stat1', stat);
  add('stat2', stat);
  add('q', rows * queryColumns(s) * e);
  if (s.headNorm) add('savedQk', rows * (s.heads + s.keyValueHeads) * s.headWidth * e);
  add('kv', pages * pageBytes(s, dtype));
  add('attended', rows * queryColumns(s) * e);
  add('logSumExp', s.heads * rows * 4);
  add('up', rows * upColumns(s) * e);
  add('activated', rows * s.feedForward * e);
}

/** One float32 and one operand intermediate at a time (transformer.cpp), for whichever micro-batch is computed. */
function addIntermediates(add: Adding, s: ModelShape, dtype: Dtype, size: CallSize, options: TrainingOptions): void {
  const { recompute = false, breadthFirst = false, place = alone } = options;
  const { rows } = size;
  const e = bytesOf(dtype);
  if (recompute) addLayer(add, s, dtype, size);
  if (place.lastStage) add('staging', stagingBytes(s, dtype, rows, { ...place, backward: true }));
  add('wide', rows * Math.max(qkvColumns(s), s.feedForward, s.width) * 4);
  add('operand', rows * Math.max(qkvColumns(s), upColumns(s), queryColumns(s)) * e);
  if (!breadthFirst) add('dx', rows * s.width * 4);
  if (dtype === 'bfloat16') add('dxOperand', rows * s.width * e);
  if ((place.keyValueRanks ?? 1) > 1) add('keyValueGradients', rows * 2 * s.headWidth * 4);
}

/** Forward and backward over whole sequences. Slots come first, then what all micro-batches use in turn. */
export function planTraining(s: ModelShape, dtype: Dtype, size: CallSize, options: TrainingOptions = {}): CallPlan {
  const { slots = { count: 1, sizes: [size] }, slot = 0, begin = 0 } = options;
  const most = (adding: typeof addKept): number =>
    Math.max(
      ...slots.sizes.map((each) => {
        let end = 0;
        adding((_, bytes) => (end = align(end) + bytes), s, dtype, each, options);
        return end;
      }),
    );
  const slotBytes = align(most(addKept));
  const planner = new CallPlanner(begin + slot * slotBytes);
  const add: Adding = (name, bytes) => planner.add(name, bytes);
  addKept(add, s, dtype, size, options);
  planner.seek(begin + slots.count * slotBytes);
  addIntermediates(add, s, dtype, size, options);
  planner.seek(begin + slots.count * slotBytes + align(most(addIntermediates)));
  return planner.done();
}

interface Inference {
  shape: ModelShape;
  place: Place;
  dtype: Dtype;
  rows: number;
  kvBytes: number;
}

function addInference(planner: CallPlanner, { shape: s, place, dtype, rows, kvBytes }: Inference): void {
  const e = bytesOf(dtype);
  planner.add('x', rows * s.width * 4);
  planner.add('normed1', rows * s.width * e);
  // With a tensor group also the sums over its ranks.
  planner.add('wide', rows * Math.max(qkvColumns(s), place.tensorRanks > 1 ? s.width : 0) * 4);
  planner.add('q', rows * queryColumns(s) * e);
  planner.add('attended', rows * queryColumns(s) * e);
  planner.add('activated', rows * s.feedForward * e);
  if (place.lastStage) planner.add('hidden', rows * s.width * e);
  planner.add('kv', kvBytes);
}

/** Forward without backward over whole sequences; all layers use one set of buffers. `begin` as of TrainingOptions. */
export function planScoring(s: ModelShape, dtype: Dtype, size: CallSize, place: Place = alone, begin = 0): CallPlan {
  const planner = new CallPlanner(begin);
  addInference(planner, { shape: s, place, dtype, rows: size.rows, kvBytes: size.pages * pageBytes(s, dtype) });
  if (place.lastStage) planner.add('staging', stagingBytes(s, dtype, size.rows, { ...place, backward: false }));
  return planner.done();
}

/** Generation: `rows` of a step, `sequences` of which tokens are sampled together, `pages` of keys and values in every layer. */
export function planGeneration(
  s: ModelShape,
  dtype: Dtype,
  size: { rows: number; sequences: number; pages: number },
  place: Place = alone,
  begin = 0,
): CallPlan {
  const planner = new CallPlanner(begin);
  const kvBytes = size.pages * s.layers * pageBytes(s, dtype);
  addInference(planner, { shape: s, place, dtype, rows: size.rows, kvBytes });
  if (!place.lastStage) return planner.done();
  planner.add('sampledHidden', size.sequences * s.width * bytesOf(dtype));
  planner.add('logits', size.sequences * (place.logitColumns ?? s.vocabulary) * 4);
  return planner.done();
}
