/**
 * Units: parameters that a pass uses together, as in FSDP [2304.11277]: what stands before the layers, each layer, what stands
 * behind them. Backward completes gradients unit by unit, and a bucket of neighbouring units is reduced over the replicas while
 * it goes on. From ZeRO stage 2 on the gradients of a bucket lie in the workspace until they are reduced, in stage 3 the compute
 * weights of a unit while it is computed.
 */
import { align, bytesOf, type CallPlan, type Dtype } from './memory-plan.js';
import type { TensorSpec } from './tensor-table.js';

/** Tensors are indices into the rank's table. */
export interface ParameterUnit {
  /** Its own, in the order of the table: their gradients are complete when backward has left it. */
  tensors: readonly number[];
  /** Those that it reads: its own, and behind the layers an embedding that is the projection too. */
  weights: readonly number[];
  /** Neighbours with the same number are reduced together; 0 is the first that backward completes. */
  bucket: number;
}

/** Among ranks of one process no size is measurably faster than another (llama-25m); small buckets leave stage 2 little to hold. */
export const defaultBucketBytes = 4 << 20;

const gradientBytes = ({ elements }: TensorSpec): number => align(elements * 4);
const weightBytes = ({ kind, elements }: TensorSpec, dtype: Dtype): number =>
  align(elements * (kind === 'matrix' ? bytesOf(dtype) : 4));
const sum = (numbers: readonly number[]): number => numbers.reduce((total, each) => total + each, 0);

/**
 * Of the tensors of a rank that has `layers` layers.
 * @param bucketBytes a bucket is closed when it has as many bytes of gradients
 */
export function parameterUnits(
  table: readonly TensorSpec[],
  layers: number,
  bucketBytes: number = defaultBucketBytes,
): ParameterUnit[] {
  const tensors: number[][] = Array.from({ length: layers + 2 }, () => []);
  const first = Number(table.map(({ name }) => layerOf(name)).find((layer) => layer !== undefined));
  let last = 0;
  for (const [index, { name }] of table.entries()) {
    const layer = layerOf(name);
    // The table is in the order of the forward pass.
    const unit = layer === undefined ? (last === 0 ? 0 : layers + 1) : 1 + Number(layer) - first;
    tensors[unit]!.push(index);
    last = unit;
  }
  const tied = table.flatMap((tensor, index) => (tensor.tied ? [index] : []));
  const units = tensors.map((own, unit) => ({
    tensors: own,
    weights: unit === layers + 1 ? [...own, ...tied] : own,
    bucket: 0,
  }));
  let bucket = 0;
  let bytes = 0;
  for (const unit of units.toReversed()) {
    unit.bucket = bucket;
    bytes += sum(unit.tensors.map((index) => gradientBytes(table[index]!)));
    if (bytes < bucketBytes) continue;
    bucket += 1;
    bytes = 0;
  }
  return units;
}

const layerOf = (name: string): string | undefined => /^layers\.(\d+)\./.exec(name)?.[1];

/** What a call does with the units: a walk needs two neighbours at a time, generation walks again and again. */
export type UnitUse = 'training' | 'scoring' | 'generation';

/**
 * Buffers of the units at the start of the workspace: `weights.u` and `gradients.u` of unit u, and the second accumulator of a
 * tied embedding, which lives from one end of backward to the other.
 */
export function planUnits(
  table: readonly TensorSpec[],
  units: readonly ParameterUnit[],
  dtype: Dtype,
  zero: number,
  use: UnitUse,
): CallPlan {
  const plan: CallPlan = { names: [], offsets: [], bytes: [], total: 0 };
  const add = (name: string, offset: number, bytes: number): void => {
    if (bytes === 0) return;
    plan.names.push(name);
    plan.offsets.push(offset);
    plan.bytes.push(bytes);
  };
  if (zero >= 3) {
    const bytes = units.map(({ tensors, weights }) =>
      sum((use === 'generation' ? tensors : weights).map((index) => weightBytes(table[index]!, dtype))),
    );
    const { offsets, total } = use === 'generation' ? inRow(bytes) : alternate(bytes);
    for (const [unit, own] of bytes.entries()) add(`weights.${unit}`, offsets[unit]!, own);
    plan.total += total;
  }
  if (zero < 2 || use !== 'training') return plan;
  const bytes = units.map(({ tensors }) => sum(tensors.map((index) => gradientBytes(table[index]!))));
  const inBucket = (bucket: number): number[] => bytes.map((own, unit) => (units[unit]!.bucket === bucket ? own : 0));
  const buckets = Array.from({ length: units[0]!.bucket + 1 }, (_, bucket) => inBucket(bucket));
  const { offsets, total } = alternate(buckets.map(sum));
  for (const [unit, own] of bytes.entries()) {
    const { bucket } = units[unit]!;
    add(`gradients.${unit}`, plan.total + offsets[bucket]! + sum(buckets[bucket]!.slice(0, unit)), own);
  }
  plan.total += total;
  for (const tensor of table.filter(({ tied }) => tied)) {
    add('secondGradient', plan.total, gradientBytes(tensor));
    plan.total += gradientBytes(tensor);
  }
  return plan;
}

interface Places {
  offsets: number[];
  total: number;
}

/** Buffers of which each is used together with the next only: at the one and the other end of a region in turn. */
function alternate(bytes: readonly number[]): Places {
  const total = Math.max(...bytes.map((own, i) => own + (bytes[i + 1] ?? 0)));
  return { offsets: bytes.map((own, i) => (i % 2 === 0 ? 0 : total - own)), total };
}

function inRow(bytes: readonly number[]): Places {
  return { offsets: bytes.map((_, i) => sum(bytes.slice(0, i))), total: sum(bytes) };
}
