/** Ranks of a 3D layout, in training and in generation (HybridFlow [2409.19256], sections 2 and 5). */
import { LockstepError } from '../errors.js';

/** Degrees of pipeline, tensor and data parallelism; rank = dp p t + pp t + tp. */
export interface Degrees {
  pipeline: number;
  tensor: number;
  data: number;
}

export interface Coordinates {
  pipeline: number;
  tensor: number;
  data: number;
}

/** Generation layout inside each training replica (HybridFlow, section 5.2). */
export interface GenerationDegrees {
  pipeline: number;
  tensor: number;
}

export function worldSize(d: Degrees): number {
  return d.pipeline * d.tensor * d.data;
}

export function coordinatesOf(rank: number, d: Degrees): Coordinates {
  const stage = Math.floor(rank / d.tensor);
  return { pipeline: stage % d.pipeline, tensor: rank % d.tensor, data: Math.floor(stage / d.pipeline) };
}

export function rankOf(c: Coordinates, d: Degrees): number {
  return (c.data * d.pipeline + c.pipeline) * d.tensor + c.tensor;
}

/**
 * Generation replica of every rank, numbered by (data, micro-DP index), and how many there are. Ranks of one replica stand at
 * intervals t/t_g and p/p_g; the micro-DP index of (pipeline, tensor) is (pipeline mod p/p_g, tensor mod t/t_g).
 */
export function generationReplicas(
  train: Degrees,
  generation: GenerationDegrees,
): { replicaOfRank: number[]; count: number } {
  const stages = train.pipeline / generation.pipeline;
  const slices = train.tensor / generation.tensor;
  if (!Number.isInteger(stages) || !Number.isInteger(slices)) {
    throw new LockstepError(
      'LAYOUT_INVALID',
      `Generation degrees pipeline ${generation.pipeline}, tensor ${generation.tensor} do not divide the training degrees ` +
        `pipeline ${train.pipeline}, tensor ${train.tensor}; choose divisors.`,
      { train, generation },
    );
  }
  const replicaOfRank = Array.from({ length: worldSize(train) }, (_, rank) => {
    const { pipeline, tensor, data } = coordinatesOf(rank, train);
    return (data * stages + (pipeline % stages)) * slices + (tensor % slices);
  });
  return { replicaOfRank, count: train.data * stages * slices };
}
