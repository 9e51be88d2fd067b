/**
 * The 3D-HybridEngine (HybridFlow [2409.19256], section 5): where generation's groups lie on the ranks of training, what of
 * the model each rank holds in either stage, and what the transition between them costs (Table 2).
 *
 * Sizes here are those of a model whose layers are cut evenly into t slices; `transitionPlan` counts real tensors.
 */
import {
  coordinatesOf,
  type Degrees,
  type GenerationCoordinates,
  type GenerationDegrees,
  generationCoordinates,
  groupRanks,
  microReplicas,
  worldSize,
} from './parallel.js';
import { type Range, stageLayers } from './stages.js';

/** How weights come from training to generation: DeepSpeed-Chat's way, HybridFlow's with vanilla groups, HybridFlow's. */
export type TransitionEngine = 'ds-chat' | 'hybridflow-v' | 'hybridflow';

export type Grouping = 'vanilla' | 'hybridflow';

export interface GenerationGroups {
  tensor: number[][];
  pipeline: number[][];
  /** Ranks with the same generation shard and different prompts, inside one training replica. */
  microData: number[][];
  /** Training replica major, micro index minor. */
  replicaOfRank: number[];
}

/** Layers begin .. end - 1 of the model, and slices firstSlice .. endSlice - 1 of the t into which each is cut. */
export interface Region extends Range {
  firstSlice: number;
  endSlice: number;
}

/** Bytes of one rank: received, held at the peak, and held in generation beside the generation weights. */
export interface TransitionCost {
  receiveBytes: number;
  peakBytes: number;
  redundantBytes: number;
}

/** Vanilla groups (Figure 8(a)) take consecutive ranks: tensor innermost, then pipeline, then micro. */
function vanillaCoordinates(rank: number, train: Degrees, generation: GenerationDegrees): GenerationCoordinates {
  microReplicas(train, generation);
  const { data } = coordinatesOf(rank, train);
  const local = rank % (train.pipeline * train.tensor);
  return {
    tensor: local % generation.tensor,
    pipeline: Math.floor(local / generation.tensor) % generation.pipeline,
    micro: Math.floor(local / (generation.tensor * generation.pipeline)),
    data,
  };
}

const placements = { vanilla: vanillaCoordinates, hybridflow: generationCoordinates };

/** @throws RANK_INVALID, PARALLEL_INVALID */
export function placeInGeneration(
  rank: number,
  train: Degrees,
  generation: GenerationDegrees,
  grouping: Grouping,
): GenerationCoordinates {
  return placements[grouping](rank, train, generation);
}

/** @throws PARALLEL_INVALID when p_g does not divide p, or t_g does not divide t */
export function generationGroups(train: Degrees, generation: GenerationDegrees, grouping: Grouping): GenerationGroups {
  const world = worldSize(train);
  const micros = microReplicas(train, generation);
  const places = Array.from({ length: world }, (_, rank) => placeInGeneration(rank, train, generation, grouping));
  const group = (without: keyof GenerationCoordinates): number[][] =>
    groupRanks(world, (rank) => {
      const key: GenerationCoordinates = { ...(places[rank] as GenerationCoordinates) };
      key[without] = 0;
      return `${key.data} ${key.pipeline} ${key.tensor} ${key.micro}`;
    });
  return {
    tensor: group('tensor'),
    pipeline: group('pipeline'),
    microData: group('micro'),
    replicaOfRank: places.map(({ data, micro }) => data * micros + micro),
  };
}

/** Layers of each generation stage: those of the training stages that it joins. */
export function generationStages(layers: number, train: Degrees, generation: GenerationDegrees): Range[] {
  microReplicas(train, generation);
  const stages = stageLayers(layers, train.pipeline);
  const m = train.pipeline / generation.pipeline;
  return Array.from({ length: generation.pipeline }, (_, stage) => ({
    begin: (stages[stage * m] as Range).begin,
    end: (stages[stage * m + m - 1] as Range).end,
  }));
}

/** What of the model a rank holds in training. */
export function trainingRegion(rank: number, train: Degrees, layers: number): Region {
  const { pipeline, tensor } = coordinatesOf(rank, train);
  const range = stageLayers(layers, train.pipeline)[pipeline] as Range;
  return { ...range, firstSlice: tensor, endSlice: tensor + 1 };
}

/** What of the model a rank holds in generation: the union of d_g training shards. */
export function generationRegion(
  rank: number,
  train: Degrees,
  generation: GenerationDegrees,
  grouping: Grouping,
  layers: number,
): Region {
  const { pipeline, tensor } = placeInGeneration(rank, train, generation, grouping);
  const k = train.tensor / generation.tensor;
  return {
    ...(generationStages(layers, train, generation)[pipeline] as Range),
    firstSlice: tensor * k,
    endSlice: (tensor + 1) * k,
  };
}

/** Slices of layers in a region. */
export const regionSlices = (region: Region): number =>
  (region.end - region.begin) * (region.endSlice - region.firstSlice);

/** Slices of layers that two regions share. */
export function sharedSlices(a: Region, b: Region): number {
  const layers = Math.min(a.end, b.end) - Math.max(a.begin, b.begin);
  const slices = Math.min(a.endSlice, b.endSlice) - Math.max(a.firstSlice, b.firstSlice);
  return Math.max(0, layers) * Math.max(0, slices);
}

/** Table 2, for M = `modelBytes` cut evenly. */
export function transitionCost(
  engine: TransitionEngine,
  modelBytes: number,
  train: Degrees,
  generation: GenerationDegrees,
): TransitionCost {
  const world = worldSize(train);
  const shards = train.pipeline * train.tensor;
  const micros = microReplicas(train, generation);
  const gathered = (among: number): TransitionCost => ({
    receiveBytes: (modelBytes * (among - 1)) / among,
    peakBytes: modelBytes,
    redundantBytes: modelBytes / among,
  });
  switch (engine) {
    case 'ds-chat':
      return gathered(world);
    case 'hybridflow-v':
      return gathered(shards);
    case 'hybridflow':
      return {
        receiveBytes: (modelBytes * (micros - 1)) / shards,
        peakBytes: modelBytes / (generation.pipeline * generation.tensor),
        redundantBytes: 0,
      };
  }
}
