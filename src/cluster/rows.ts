/**
 * Batches that ranks share: values with rows, cut and joined without copying what lies in one buffer already.
 *
 * - An array or typed array has its elements as rows.
 * - A plain object has rows when its arrays do, all the same number. Its other values (numbers, strings, functions) belong to
 *   every part. Two names have a meaning: `lengths` makes it packed, with one length (at least 1) per row and arrays over
 *   rows or over the packed tokens; `groupSize` keeps that many consecutive rows in one part.
 * - Objects nest: one without `lengths` is cut like the object around it, one with `lengths` by its own.
 */
import { evenRanges, type RowRange } from '../data/batch.js';
import { LockstepError } from '../errors.js';

type TypedArray = Exclude<NodeJS.ArrayBufferView, DataView>;
type RowArray = readonly unknown[] | TypedArray;
/** A plain object. */
type Fields = Readonly<Record<string, unknown>>;

/** What a row is in an object: how many there are and, when packed, where each one's tokens start. */
interface Axes {
  rows: number;
  /** [rows + 1] */
  starts?: Float64Array;
}

/** Rows of a batch. Errors: `BATCH_INVALID` for a value without rows. */
export function rowCount(batch: unknown): number {
  return axesOf(batch).rows;
}

/** Rows [begin, end) as views of the batch's arrays. Errors: `BATCH_INVALID` for an array of another length than rows or tokens. */
export function sliceRows<T>(batch: T, { begin, end }: RowRange): T {
  return slice(batch, axesOf(batch), { begin, end }, 'batch') as T;
}

/**
 * All rows of the parts, in order; views that follow each other in one buffer become one view of it. Errors: `BATCH_INVALID`
 * when the parts differ in their names, kinds of array, or in a value that is not an array.
 */
export function concatRows<T>(parts: readonly T[]): T {
  if (parts.length === 0) throw invalid('there are no parts to join; expected at least one');
  return join(parts, 'batch') as T;
}

/** A batch that lies in parts: what ranks answered, in the order of rows. A call cuts it anew only where it needs other parts. */
export class Shards<T> {
  /** At least one. */
  constructor(readonly parts: readonly T[]) {
    if (parts.length === 0) throw invalid('a batch was given in no parts; expected at least one');
  }

  /** `count` parts with all rows, empty ones last: the parts as they are when they are that many whole ones, else even ones. */
  cut(count: number): readonly T[] {
    const { parts } = this;
    if (count === 1) return [this.join()];
    const sizes = parts.map(rowCount);
    const groupSize = groupSizeOf(parts[0]);
    if (parts.length === count && sizes.every((size) => size % groupSize === 0)) return parts;
    const total = sizes.reduce((sum, size) => sum + size, 0);
    return evenRanges(total, count, groupSize).map((range) => this.slice(range, sizes));
  }

  join(): T {
    return concatRows(this.parts);
  }

  private slice({ begin, end }: RowRange, sizes: readonly number[]): T {
    const pieces: T[] = [];
    let at = 0;
    this.parts.forEach((part, i) => {
      const own = { begin: Math.max(begin - at, 0), end: Math.min(end - at, sizes[i]!) };
      if (own.begin < own.end) pieces.push(sliceRows(part, own));
      at += sizes[i]!;
    });
    return pieces.length > 0 ? concatRows(pieces) : sliceRows(this.parts[0]!, { begin: 0, end: 0 });
  }
}

function axesOf(batch: unknown): Axes {
  const axes = findAxes(batch, 'batch');
  if (axes) return axes;
  throw invalid(
    `${describe(batch)} has no rows; expected an array, a typed array or a plain object of them as the first argument or answer`,
  );
}

/** The axes of the first array inside; the others are held against it when they are cut. */
function findAxes(value: unknown, path: string): Axes | undefined {
  if (isRowArray(value)) return { rows: value.length };
  if (!isRecord(value)) return undefined;
  if ('lengths' in value) return packedAxes(value.lengths, `${path}.lengths`);
  for (const [name, field] of Object.entries(value)) {
    const axes = findAxes(field, `${path}.${name}`);
    if (axes) return { rows: axes.rows };
  }
  return undefined;
}

function packedAxes(lengths: unknown, path: string): Axes {
  if (!isRowArray(lengths))
    throw invalid(`${path} is ${describe(lengths)}; expected the number of tokens of every row`);
  const starts = new Float64Array(lengths.length + 1);
  lengths.forEach((length: unknown, row: number) => {
    // With rows of no tokens, an array over rows could not be told from one over tokens.
    if (!Number.isInteger(length) || (length as number) < 1) {
      throw invalid(`${path}[${row}] is ${String(length)}; expected an integer of at least 1`);
    }
    starts[row + 1] = starts[row]! + (length as number);
  });
  return { rows: lengths.length, starts };
}

function groupSizeOf(batch: unknown): number {
  const groupSize = isRecord(batch) ? (batch.groupSize ?? 1) : 1;
  if (Number.isInteger(groupSize) && (groupSize as number) > 0) return groupSize as number;
  throw invalid(`batch.groupSize is ${String(groupSize)}; expected an integer of at least 1`);
}

function slice(value: unknown, axes: Axes, range: RowRange, path: string): unknown {
  const { rows, starts } = axes;
  if (isRowArray(value)) {
    if (value.length === rows) return view(value, range.begin, range.end);
    if (value.length === starts?.[rows]) return view(value, starts[range.begin]!, starts[range.end]!);
    throw misfit(path, value.length, axes);
  }
  if (!isRecord(value)) {
    if (isShared(value)) return value;
    throw invalid(`${path} is ${describe(value)}, which has no rows and cannot be cut; pass it as another argument`);
  }
  const own = 'lengths' in value ? packedAxes(value.lengths, `${path}.lengths`) : axes;
  if (own.rows !== rows) throw misfit(`${path}.lengths`, own.rows, axes);
  return mapRecord(value, (field, name) => slice(field, own, range, `${path}.${name}`));
}

function join(values: readonly unknown[], path: string): unknown {
  const [first] = values;
  if (values.length === 1) return first;
  if (Array.isArray(first) && values.every(Array.isArray)) return values.flat();
  if (isTypedArray(first) && values.every((value) => isTypedArray(value) && kindOf(value) === kindOf(first))) {
    return joinTyped(values as readonly TypedArray[]);
  }
  if (isRecord(first) && values.every(isRecord)) {
    const names = new Set(values.flatMap((value) => Object.keys(value)));
    return Object.fromEntries(
      Array.from(names, (name) => [
        name,
        join(
          values.map((value) => value[name]),
          `${path}.${name}`,
        ),
      ]),
    );
  }
  if (isShared(first) && values.every((value) => Object.is(value, first))) return first;
  const other = values.find((value) => !Object.is(value, first));
  throw invalid(
    `${path} cannot be joined: parts hold ${describe(first)} and ${describe(other)}; expected arrays of one kind, objects ` +
      'of them, or the same value in every part',
  );
}

function joinTyped(parts: readonly TypedArray[]): TypedArray {
  const filled = parts.filter(({ length }) => length > 0);
  if (filled.length <= 1) return filled[0] ?? parts[0]!;
  const [first] = filled as [TypedArray];
  const length = filled.reduce((sum, part) => sum + part.length, 0);
  const kind = typedArrays[kindOf(first)]!;
  const adjacent = filled.every((part, i) => {
    const before = filled[i - 1];
    return !before || (part.buffer === before.buffer && part.byteOffset === before.byteOffset + before.byteLength);
  });
  if (adjacent) return new kind(first.buffer, first.byteOffset, length);
  const joined = new kind(length);
  let at = 0;
  for (const part of filled) {
    joined.set(part as never, at);
    at += part.length;
  }
  return joined;
}

const kindOf = (array: TypedArray): string => array[Symbol.toStringTag];

interface TypedArrayConstructor {
  new (length: number): TypedArray;
  new (buffer: ArrayBufferLike, byteOffset: number, length: number): TypedArray;
}

/** Node's Buffer counts as the Uint8Array that it is. */
const typedArrays = Object.fromEntries(
  [
    ...[Int8Array, Uint8Array, Uint8ClampedArray, Int16Array, Uint16Array, Int32Array, Uint32Array],
    ...[Float32Array, Float64Array, BigInt64Array, BigUint64Array],
  ].map((kind) => [kind.name, kind as unknown as TypedArrayConstructor]),
);

function view(array: RowArray, begin: number, end: number): RowArray {
  return isTypedArray(array) ? array.subarray(begin, end) : array.slice(begin, end);
}

function isTypedArray(value: unknown): value is TypedArray {
  return ArrayBuffer.isView(value) && !(value instanceof DataView);
}

function isRowArray(value: unknown): value is RowArray {
  return Array.isArray(value) || isTypedArray(value);
}

function isRecord(value: unknown): value is Fields {
  if (typeof value !== 'object' || value === null) return false;
  const prototype = Object.getPrototypeOf(value);
  return prototype === Object.prototype || prototype === null;
}

function isShared(value: unknown): boolean {
  return typeof value !== 'object' || value === null;
}

function mapRecord(record: Fields, map: (value: unknown, name: string) => unknown): Fields {
  return Object.fromEntries(Object.entries(record).map(([name, value]) => [name, map(value, name)]));
}

function describe(value: unknown): string {
  if (isTypedArray(value)) return `a ${kindOf(value)}`;
  if (Array.isArray(value)) return 'an array';
  if (typeof value === 'function') return 'a function';
  if (typeof value !== 'object' || value === null)
    return `${typeof value === 'string' ? JSON.stringify(value) : value}`;
  return isRecord(value) ? 'an object' : `an instance of ${value.constructor?.name}`;
}

function misfit(path: string, length: number, { rows, starts }: Axes): LockstepError {
  const tokens = starts ? ` or ${starts[rows]}, one per token` : '';
  return invalid(
    `${path} has ${length} entries; expected ${rows}, one per row${tokens}. Pass what does not belong to rows as another argument`,
  );
}

function invalid(message: string): LockstepError {
  return new LockstepError('BATCH_INVALID', `${message}.`);
}
