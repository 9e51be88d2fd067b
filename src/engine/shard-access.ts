/** Checkpoint tensors that lie on several ranks: put together from their rows and columns, and taken apart again. */
import { LockstepError } from '../errors.js';
import type { TensorSource } from '../layout/tensor-table.js';
import type { ParameterSpace } from './engine.js';
import type { NativePieces } from './native.js';
import { type NativeEngine, type TensorHome, transpose } from './native-engine.js';

/** Logical shape of a checkpoint tensor, [out rows, in columns]. */
function extents({ shape, transposed }: TensorSource): { rows: number; columns: number } {
  const [first, second = 1] = shape as [number, number?];
  return transposed ? { rows: second, columns: first } : { rows: first, columns: second };
}

/** The rows of one home, packed: native pieces over them, and where each begins in the checkpoint's tensor. */
function packedRows({ index, source }: TensorHome): { pieces: NativePieces; sourceRows: number[] } {
  const pieces: NativePieces = [];
  const sourceRows: number[] = [];
  for (const piece of source.pieces) {
    pieces.push(sourceRows.length, index, piece.row, piece.rows);
    for (let row = 0; row < piece.rows; row++) sourceRows.push(piece.sourceRow + row);
  }
  return { pieces, sourceRows };
}

function homesOn(ranks: readonly NativeEngine[], name: string): { engine: NativeEngine; home: TensorHome }[] {
  const homes = ranks.flatMap((engine) => engine.homesOf(name).map((home) => ({ engine, home })));
  if (homes.length === 0) {
    throw new LockstepError('MODEL_TENSOR_UNKNOWN', `The model has no tensor '${name}'.`, { name });
  }
  return homes;
}

/** What the ranks of one replica hold of a tensor. Rows that several hold are the lowest rank's, or the sum of all. */
async function readReplica(
  ranks: readonly NativeEngine[],
  name: string,
  space: ParameterSpace,
  { rows, columns }: { rows: number; columns: number },
): Promise<Float32Array> {
  const whole = new Float32Array(rows * columns);
  const homes = ranks.flatMap((engine) => engine.homesOf(name).map((home) => ({ engine, home })));
  for (const { engine, home } of homes.toReversed()) {
    const { pieces, sourceRows } = packedRows(home);
    const count = home.spec.in;
    const begin = home.source.columns?.begin ?? 0;
    const data = await engine.readRows(space, count, pieces);
    const summed = space === 'gradients' && home.spec.copies.some(({ gradient }) => gradient === 'partial');
    for (const [i, row] of sourceRows.entries()) {
      const at = row * columns + begin;
      const own = data.subarray(i * count, (i + 1) * count);
      if (!summed) whole.set(own, at);
      else for (let k = 0; k < count; k++) whole[at + k]! += own[k]!;
    }
  }
  return whole;
}

/**
 * The whole tensor as the checkpoint has it.
 * @param pieces replicas hold pieces (ZeRO) and zeros for the others, else all the same
 * @throws LockstepError MODEL_TENSOR_UNKNOWN
 */
export async function readShards(
  replicas: readonly (readonly NativeEngine[])[],
  name: string,
  space: ParameterSpace,
  pieces: boolean,
): Promise<Float32Array> {
  const { source } = homesOn(replicas[0]!, name)[0]!.home;
  const extent = extents(source);
  const [first, ...others] = pieces ? replicas : replicas.slice(0, 1);
  const whole = await readReplica(first!, name, space, extent);
  const bits = new Uint32Array(whole.buffer);
  for (const ranks of others) {
    const more = await readReplica(ranks, name, space, extent);
    for (const [i, word] of new Uint32Array(more.buffer).entries()) bits[i]! |= word;
  }
  return source.transposed ? transpose(whole, extent.rows, extent.columns) : whole;
}

/**
 * The inverse: every rank gets what it holds.
 * @throws LockstepError MODEL_TENSOR_UNKNOWN
 */
export async function writeShards(
  ranks: readonly NativeEngine[],
  name: string,
  data: Float32Array,
  space: ParameterSpace,
): Promise<void> {
  const homes = homesOn(ranks, name);
  const { source } = homes[0]!.home;
  const { rows, columns } = extents(source);
  const whole = source.transposed ? transpose(data, columns, rows) : data;
  for (const { engine, home } of homes) {
    const { pieces, sourceRows } = packedRows(home);
    const count = home.spec.in;
    const begin = home.source.columns?.begin ?? 0;
    const part = new Float32Array(sourceRows.length * count);
    for (const [i, row] of sourceRows.entries()) {
      part.set(whole.subarray(row * columns + begin, row * columns + begin + count), i * count);
    }
    await engine.writeRows(space, count, pieces, part);
  }
}
