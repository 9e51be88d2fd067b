/** What the addon is told of a rank's model: Spec of native/model/spec.h. */
import type { WeightPlace } from '../layout/generation-view.js';
import type { Dtype, ModelPlan } from '../layout/memory-plan.js';
import type { ModelShape } from '../layout/model-shape.js';
import { coordinatesOf, type Degrees } from '../layout/parallel.js';
import { vocabularyParts } from '../layout/parts.js';
import type { RankShare } from '../layout/rank-share.js';
import { ropeTables } from '../layout/rope.js';
import type { ShardTensor } from '../layout/shards.js';
import type { ParameterUnit } from '../layout/units.js';
import { pieceBoundaries } from '../layout/zero.js';

export interface SpecOptions {
  /** Of the whole model. */
  shape: ModelShape;
  parts: number;
  dtype: Dtype;
  train: boolean;
  recompute: boolean;
  zero: number;
  overlap: boolean;
  degrees: Degrees;
  rank: number;
  /** The rank's. */
  share: RankShare;
  table: readonly ShardTensor[];
  units: readonly ParameterUnit[];
  plan: ModelPlan;
  /** Of compute weights in a memory that others use too. */
  weights?: readonly WeightPlace[];
}

export function nativeSpec(options: SpecOptions): object {
  const { shape, share, table, plan, parts, degrees, rank, weights = [], ...rest } = options;
  const rope = shape.positions.type === 'rope' ? ropeTables(shape, shape.maxPositions) : undefined;
  return {
    ...rest,
    shape: {
      ...share.shape,
      vocabulary: shape.vocabulary,
      learnedPositions: shape.positions.type === 'learned',
      parts: share.parts,
    },
    dataRank: share.dataRank,
    dataRanks: share.dataRanks,
    firstLayer: share.firstLayer,
    vocabularyBegin: share.vocabularyBegin,
    vocabularyParts: vocabularyParts(shape.vocabulary, parts),
    tensors: table.map((tensor, i) => {
      const { name, kind, out, in: columns, split, sizes, elements, decay } = tensor;
      return {
        ...{ name, kind, out, in: columns, split, sizes, elements, decay },
        ...plan.places[i],
        ...weights[i],
        ...sharing(tensor, degrees, rank),
        // Parts that lie apart are those of a model that generates and has no replicas.
        pieces: share.dataRanks > 1 ? pieceBoundaries(tensor, share.dataRanks) : [0, weights[i]?.elements ?? elements],
      };
    }),
    weightsBytes: plan.weightsBytes,
    gradientBytes: plan.gradientBytes,
    optimizerBytes: plan.optimizerBytes,
    cosine: rope?.cosine,
    sine: rope?.sine,
  };
}

/** How a tensor's gradient and its norm come together over ranks (TensorSpec of native/model/spec.h). */
function sharing({ copies, split }: ShardTensor, degrees: Degrees, rank: number): object {
  const partial = copies.find(({ gradient }) => gradient === 'partial');
  const sameStage = partial?.ranks.every(
    (other) => coordinatesOf(other, degrees).pipeline === coordinatesOf(rank, degrees).pipeline,
  );
  const over = !sameStage ? 'ends' : split === 'none' ? 'tensor' : 'keyValue';
  return {
    cut: split !== 'none',
    owner: partial === undefined || partial.ranks[0] === rank,
    ...(partial ? { summed: over, summedBegin: partial.begin, summedEnd: partial.end } : {}),
  };
}
