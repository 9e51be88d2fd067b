/**
 * ZeRO [1910.02054]: which piece of every tensor a data-parallel rank keeps the optimizer state of, and from stage 2 on the gradient.
 * Pieces are runs of the tensor as it lies in memory, as equal as whole pairs of rows of a panel allow: such runs take the same
 * elements in the float32 and in the bfloat16 order (native/kernels/weight.h).
 */
import { packedElements, type TensorSpec } from './tensor-table.js';

/** What decides the pieces of a tensor. */
type Packed = Pick<TensorSpec, 'kind' | 'out' | 'in' | 'split' | 'sizes' | 'elements'>;

const panel = 64;
const panelGrain = 16;
const roundUp = (x: number, to: number): number => Math.ceil(x / to) * to;

/** The last place up to `element` where a piece may begin. */
function boundaryBefore(tensor: Packed, element: number): number {
  if (tensor.kind === 'vector' || element >= tensor.elements) return Math.min(element, tensor.elements);
  let base = 0;
  for (const size of tensor.sizes) {
    const rows = tensor.split === 'in' ? tensor.out : size;
    const columns = tensor.split === 'in' ? size : tensor.in;
    const elements = packedElements(rows, columns);
    if (element < base + elements) return base + boundaryInPart(rows, columns, element - base);
    base += elements;
  }
  return tensor.elements;
}

function boundaryInPart(rows: number, columns: number, element: number): number {
  const panelElements = panel * roundUp(columns, 2);
  const index = Math.floor(element / panelElements);
  const width = Math.min(panel, roundUp(rows - index * panel, panelGrain));
  const begin = index * panelElements;
  return begin + Math.floor((element - begin) / (2 * width)) * 2 * width;
}

/** Boundaries of the pieces of `count` ranks: rank i has elements [i] .. [i + 1] - 1. */
export function pieceBoundaries(tensor: Packed, count: number): number[] {
  return Array.from({ length: count + 1 }, (_, i) => boundaryBefore(tensor, Math.floor((tensor.elements * i) / count)));
}
