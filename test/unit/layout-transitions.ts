/** Golden layouts of the 3D-HybridEngine, and what their ranks keep in training. */
import { coordinatesOf, type Degrees, type GenerationDegrees, worldSize } from '../../src/layout/parallel.js';
import type { PlacedShard } from '../../src/layout/placed.js';
import type { TransitionOptions } from '../../src/layout/transition-plan.js';
import { readTopics } from '../rl-fixtures.js';

export interface TransitionLayout {
  name: string;
  train: Degrees;
  generation: GenerationDegrees;
}

/** Of the models on which layouts are run. */
export const parts = 8;

/** Those of topic hybrid_engine whose tensor degrees a model of so many parts can have. */
export function goldenLayouts(parts: number): TransitionLayout[] {
  const isPart = (degree: number) => parts % degree === 0;
  return readTopics()
    .filter(({ topic }) => topic === 'hybrid_engine')
    .flatMap(({ cases }) => cases)
    .map(({ name, inputs }) => {
      const { p, t, d } = inputs.train as Record<'p' | 't' | 'd', number>;
      const generation = inputs.generation as Record<'p' | 't', number>;
      return {
        name,
        train: { pipeline: p, tensor: t, data: d },
        generation: { pipeline: generation.p, tensor: generation.t },
      };
    })
    .filter(({ train, generation }) => isPart(train.tensor) && isPart(generation.tensor));
}

/** What rank r keeps in training, by the definition of its engine. */
export function trainingMemory(
  options: TransitionOptions,
  shards: readonly PlacedShard[],
  arenas: readonly Uint8Array[],
): Uint8Array[] {
  return Array.from({ length: worldSize(options.train) }, (_, rank) => {
    const shard = shards[rank % shards.length]!;
    const arena = arenas[rank % shards.length]!;
    if (options.engine !== 'ds-chat' || options.train.data === 1) return arena;
    const { data } = coordinatesOf(rank, options.train);
    const pieces: number[] = [];
    for (const { tensor, offset, elementBytes } of shard.tensors) {
      const [begin, end] = [data, data + 1].map((i) => Math.floor((tensor.elements * i) / options.train.data));
      pieces.push(...arena.subarray(offset + begin! * elementBytes, offset + end! * elementBytes));
      while (pieces.length % 64 !== 0) pieces.push(0);
    }
    return Uint8Array.from(pieces);
  });
}
