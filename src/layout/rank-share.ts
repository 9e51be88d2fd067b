/**
 * A rank's share of a model as a shape: what its kernels compute and its buffers hold. Every dimension that is cut has the
 * rank's size; the vocabulary has the rows that the rank holds. `shardTable` says which rows and columns of which tensors.
 */
import type { ModelShape } from './model-shape.js';
import { coordinatesOf, type Degrees } from './parallel.js';
import { vocabularyParts } from './parts.js';
import { rankParts } from './shards.js';
import { type Range, stageLayers } from './stages.js';

export interface RankShare {
  shape: ModelShape;
  /** The rank's parts of `numerics.parts`. */
  parts: number;
  /** Its first layer, in the whole model. */
  firstLayer: number;
  /** Its first row of the embedding and the vocabulary. */
  vocabularyBegin: number;
  /** Ranks that share each of its layers, and of those the ranks that share each key/value head. */
  tensorRanks: number;
  keyValueRanks: number;
  /** Of the ranks with the same share. */
  dataRank: number;
  dataRanks: number;
  /** Columns of a row of logits: the whole vocabulary. */
  logitColumns: number;
  /** It has the final norm and the head, and with them the answers. */
  lastStage: boolean;
}

/** `stages` as of `shardTable`. @throws PARALLEL_INVALID, RANK_INVALID */
export function rankShare(
  shape: ModelShape,
  parts: number,
  degrees: Degrees,
  rank: number,
  stages: readonly Range[] = stageLayers(shape.layers, degrees.pipeline),
): RankShare {
  const at = coordinatesOf(rank, degrees);
  const { tensor } = degrees;
  const held = rankParts(parts, tensor, at.tensor);
  const layers = stages[at.pipeline] as Range;
  const sizes = vocabularyParts(shape.vocabulary, parts);
  const rows = (begin: number, end: number) => sizes.slice(begin, end).reduce((sum, size) => sum + size, 0);
  return {
    shape: {
      ...shape,
      vocabulary: rows(held.begin, held.end),
      layers: layers.end - layers.begin,
      heads: shape.heads / tensor,
      keyValueHeads: Math.max(1, shape.keyValueHeads / tensor),
      feedForward: shape.feedForward / tensor,
      windows: shape.windows.slice(layers.begin, layers.end),
    },
    parts: held.end - held.begin,
    firstLayer: layers.begin,
    vocabularyBegin: rows(0, held.begin),
    tensorRanks: tensor,
    keyValueRanks: Math.max(1, tensor / shape.keyValueHeads),
    dataRank: at.data,
    dataRanks: degrees.data,
    logitColumns: shape.vocabulary,
    lastStage: at.pipeline === degrees.pipeline - 1,
  };
}
