/**
 * Which rows and columns of which files a rank reads or writes: its tensor table against whole tensors in files. Of rows that
 * several ranks hold, all read them and the owner alone writes them, so the writes of all ranks together cover every number of
 * every tensor once.
 */
import type { Copies } from '../layout/shards.js';
import type { Piece, TensorSource, TensorSpec } from '../layout/tensor-table.js';
import type { FileTensor } from './engine.js';
import type { NativeSlice } from './native.js';

/** A tensor of a rank that may not be alone. */
export type HeldTensor = TensorSpec & { readonly copies?: readonly Copies[] };

/** In the order of files and of places in them: each file is opened once and passed through forwards. */
export function slicesToLoad(table: readonly HeldTensor[], tensors: readonly FileTensor[]): NativeSlice[] {
  return slices(table, tensors, (_, source) => source.pieces);
}

/** `rank` as `copies` number it. */
export function slicesToSave(
  table: readonly HeldTensor[],
  rank: number,
  tensors: readonly FileTensor[],
): NativeSlice[] {
  return slices(table, tensors, (spec, source) => ownPieces(source.pieces, spec.copies ?? [], rank));
}

function slices(
  table: readonly HeldTensor[],
  tensors: readonly FileTensor[],
  piecesOf: (spec: HeldTensor, source: TensorSource) => readonly Piece[],
): NativeSlice[] {
  const byName = new Map<string, FileTensor[]>();
  for (const tensor of tensors) byName.set(tensor.name, [...(byName.get(tensor.name) ?? []), tensor]);
  return table
    .flatMap((spec, index) =>
      spec.sources.flatMap((source) => {
        const pieces = piecesOf(spec, source);
        if (pieces.length === 0) return [];
        const flat = pieces.flatMap(({ sourceRow, row, rows }) => [sourceRow, index, row, rows]);
        return (byName.get(source.name) ?? []).map((tensor) => ({ ...tensor, ...extentsOf(source), pieces: flat }));
      }),
    )
    .sort((a, b) => (a.file === b.file ? a.offset - b.offset : a.file < b.file ? -1 : 1));
}

/** Logical shape [out rows, in columns], and the columns that the rank has. */
function extentsOf({ shape, transposed, columns: held }: TensorSource) {
  const [first, second = 1] = shape as [number, number?];
  const [rows, columns] = transposed ? [second, first] : [first, second];
  return { rows, columns, transposed, columnBegin: held?.begin ?? 0, columnCount: held?.count ?? columns };
}

/** Pieces without the rows that another rank owns. */
function ownPieces(pieces: readonly Piece[], copies: readonly Copies[], rank: number): readonly Piece[] {
  let own = pieces;
  for (const { begin, end, ranks } of copies) {
    if (ranks[0] !== rank) own = own.flatMap((piece) => [...rowsOf(piece, 0, begin), ...rowsOf(piece, end, Infinity)]);
  }
  return own;
}

/** Rows begin .. end - 1 of the rank's tensor, as far as the piece has them. */
function rowsOf({ sourceRow, row, rows }: Piece, begin: number, end: number): Piece[] {
  const first = Math.max(begin, row);
  const count = Math.min(end, row + rows) - first;
  return count > 0 ? [{ sourceRow: sourceRow + first - row, row: first, rows: count }] : [];
}
