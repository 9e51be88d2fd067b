/**
 * 3D parallelism as arithmetic: which rank holds which part of a model, and the groups in which ranks communicate
 * (HybridFlow [2409.19256], section 5). A training rank is dp p t + pp t + tp. Groups hold global ranks, in group order, and
 * are listed by their first rank.
 */
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

/** Degrees of generation: p_g and t_g. The p t / (p_g t_g) = d_g micro-replicas of each training replica follow from them. */
export interface GenerationDegrees {
  pipeline: number;
  tensor: number;
}

/** Place of a rank in generation; `micro` counts the d_g generation replicas inside one training replica. */
export interface GenerationCoordinates extends Coordinates {
  micro: number;
}

function checkDegrees(degrees: Readonly<Record<string, number>>, what: string): void {
  for (const [name, degree] of Object.entries(degrees)) {
    if (Number.isSafeInteger(degree) && degree >= 1) continue;
    const message = `${what}.${name}: ${degree} is not a degree of parallelism: it must be an integer, at least 1. Write 1 for none.`;
    throw new LockstepError('PARALLEL_INVALID', message, { key: `${what}.${name}`, received: degree });
  }
}

/**
 * Ranks of a layout: p t d.
 * @throws PARALLEL_INVALID when a degree is not an integer of at least 1
 */
export function worldSize(d: Degrees): number {
  const { pipeline, tensor, data } = d;
  checkDegrees({ pipeline, tensor, data }, 'parallel');
  return pipeline * tensor * data;
}

/** @throws RANK_INVALID, PARALLEL_INVALID */
export function coordinatesOf(rank: number, d: Degrees): Coordinates {
  const world = worldSize(d);
  if (!Number.isSafeInteger(rank) || rank < 0 || rank >= world) {
    const message = `Rank ${rank} does not exist: pipeline ${d.pipeline} x tensor ${d.tensor} x data ${d.data} has ranks 0..${world - 1}.`;
    throw new LockstepError('RANK_INVALID', message, { received: rank, world, degrees: d });
  }
  return {
    pipeline: Math.floor(rank / d.tensor) % d.pipeline,
    tensor: rank % d.tensor,
    data: Math.floor(rank / (d.pipeline * d.tensor)),
  };
}

/** @throws RANK_INVALID, PARALLEL_INVALID */
export function rankOf(c: Coordinates, d: Degrees): number {
  worldSize(d);
  for (const axis of ['pipeline', 'tensor', 'data'] as const) {
    if (Number.isSafeInteger(c[axis]) && c[axis] >= 0 && c[axis] < d[axis]) continue;
    const message = `Coordinate ${axis} ${c[axis]} does not exist: the ${axis} degree ${d[axis]} has 0..${d[axis] - 1}.`;
    throw new LockstepError('RANK_INVALID', message, { axis, received: c[axis], degree: d[axis] });
  }
  return (c.data * d.pipeline + c.pipeline) * d.tensor + c.tensor;
}

/** Ranks 0 .. world - 1 with equal keys form a group; groups come in the order of their first rank, ranks ascending. */
export function groupRanks(world: number, keyOf: (rank: number) => number | string): number[][] {
  const groups = new Map<number | string, number[]>();
  for (let rank = 0; rank < world; rank++) {
    const key = keyOf(rank);
    const group = groups.get(key);
    if (group) group.push(rank);
    else groups.set(key, [rank]);
  }
  return [...groups.values()];
}

function trainingGroups(d: Degrees, without: keyof Coordinates): number[][] {
  return groupRanks(worldSize(d), (rank) => rankOf({ ...coordinatesOf(rank, d), [without]: 0 }, d));
}

/** Ranks that differ in their tensor coordinate alone, one list per (data, pipeline). */
export function tensorGroups(d: Degrees): number[][] {
  return trainingGroups(d, 'tensor');
}

/** Ranks that differ in their stage alone, first stage first. */
export function pipelineGroups(d: Degrees): number[][] {
  return trainingGroups(d, 'pipeline');
}

/** Ranks that hold the same shard. */
export function dataGroups(d: Degrees): number[][] {
  return trainingGroups(d, 'data');
}

/**
 * Micro-replicas per training replica, d_g = p t / (p_g t_g).
 * @throws PARALLEL_INVALID when p_g does not divide p, or t_g does not divide t
 */
export function microReplicas(train: Degrees, generation: GenerationDegrees): number {
  worldSize(train);
  checkDegrees({ pipeline: generation.pipeline, tensor: generation.tensor }, 'generation');
  for (const axis of ['pipeline', 'tensor'] as const) {
    if (train[axis] % generation[axis] === 0) continue;
    const message =
      `generation.${axis}: ${generation[axis]} does not divide parallel.${axis} ${train[axis]}: a generation shard must be a ` +
      `union of whole training shards. Use a divisor of ${train[axis]}.`;
    throw new LockstepError('PARALLEL_INVALID', message, {
      key: `generation.${axis}`,
      received: generation[axis],
      train: train[axis],
    });
  }
  return (train.pipeline / generation.pipeline) * (train.tensor / generation.tensor);
}

/**
 * HybridFlow grouping (Figure 8(b)): generation's tensor and pipeline groups take ranks at intervals k = t/t_g and
 * m = p/p_g, so that the training shards of the d_g = k m neighbours in between make up one generation shard.
 * With tp = a k + b and pp = c m + e: tensor a, pipeline c, micro e k + b.
 */
export function generationCoordinates(
  rank: number,
  train: Degrees,
  generation: GenerationDegrees,
): GenerationCoordinates {
  microReplicas(train, generation);
  const { pipeline, tensor, data } = coordinatesOf(rank, train);
  const k = train.tensor / generation.tensor;
  const m = train.pipeline / generation.pipeline;
  return {
    pipeline: Math.floor(pipeline / m),
    tensor: Math.floor(tensor / k),
    data,
    micro: (pipeline % m) * k + (tensor % k),
  };
}

/**
 * The generation replica of each rank under HybridFlow grouping (training replica major, micro index minor) and how many
 * there are: d d_g. The ranks of one replica share their prompts.
 */
export function generationReplicas(
  train: Degrees,
  generation: GenerationDegrees,
): { replicaOfRank: number[]; count: number } {
  const micros = microReplicas(train, generation);
  const replicaOfRank = Array.from({ length: worldSize(train) }, (_, rank) => {
    const { data, micro } = generationCoordinates(rank, train, generation);
    return data * micros + micro;
  });
  return { replicaOfRank, count: train.data * micros };
}
