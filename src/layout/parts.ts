/** `numerics.parts`: into how many parts heads, F and V are cut (DESIGN §2). A constant of a run; bits compare at equal parts. */
import { LockstepError } from '../errors.js';
import type { ModelShape } from './model-shape.js';

const largestDefault = 8;
const smallestLeaf = 128;

/** Why a model cannot be cut into so many parts; undefined when it can. */
function obstacle(shape: ModelShape, parts: number): string | undefined {
  const { heads, keyValueHeads, feedForward } = shape;
  if (!Number.isSafeInteger(parts) || parts < 1 || 2 ** Math.round(Math.log2(parts)) !== parts) {
    return 'it must be a power of two, at least 1';
  }
  if (heads % parts !== 0) return `it must divide the ${heads} attention heads`;
  if (feedForward % parts !== 0) return `it must divide the feed-forward width ${feedForward}`;
  if (keyValueHeads % parts !== 0 && parts % keyValueHeads !== 0) {
    return `it must divide the ${keyValueHeads} key/value heads or be a multiple of them`;
  }
  return undefined;
}

/** The largest power of two up to 8 that the model allows and that leaves sums of at least 128 terms in each part; at least 1. */
export function defaultParts(shape: ModelShape): number {
  for (let parts = largestDefault; parts > 1; parts /= 2) {
    const leaf = Math.min(shape.heads * shape.headWidth, shape.feedForward) / parts;
    if (leaf >= smallestLeaf && obstacle(shape, parts) === undefined) return parts;
  }
  return 1;
}

/** @throws PARTS_INVALID with the reason. */
export function resolveParts(shape: ModelShape, requested: number | 'auto' = 'auto'): number {
  if (requested === 'auto') return defaultParts(shape);
  const reason = obstacle(shape, requested);
  if (reason === undefined) return requested;
  const message =
    `numerics.parts: ${requested} is not possible for this model: ${reason}. ` +
    `The default for it is ${defaultParts(shape)}.`;
  throw new LockstepError('PARTS_INVALID', message, { received: requested, reason, default: defaultParts(shape) });
}

/** Rows of the vocabulary per part: ceil(V / parts), the last ones smaller or empty. */
export function vocabularyParts(vocabulary: number, parts: number): number[] {
  const size = Math.ceil(vocabulary / parts);
  return Array.from({ length: parts }, (_, part) => Math.max(0, Math.min(size, vocabulary - part * size)));
}
