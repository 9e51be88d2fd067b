/**
 * The transition of the 3D-HybridEngine as slices, for the three engines of HybridFlow's Table 2 [2409.19256, section 5.4].
 *
 * A rank's generation buffer is a row of slots, each one whole training shard as it lies in its rank's weights arena:
 * - `hybridflow`: the d_g shards of its micro-data group, in group order. Its own training shard *is* its slot, so the
 *   transition is one all-gather per group, the way back moves nothing, and nothing is held twice.
 * - `hybridflow-v`: all p t shards; the training shard stays where it was.
 * - `ds-chat`: all p t shards, gathered from ZeRO-3 pieces: data rank i keeps piece i of d of every tensor.
 * Generation reads the d_g slots that make up its shard, in order of stage and tensor rank. A way back is never needed:
 * slots hold what training keeps.
 */
import { type Grouping, generationGroups, placeInGeneration, type TransitionEngine } from './hybrid-engine.js';
import type { Dtype } from './memory-plan.js';
import type { ModelShape } from './model-shape.js';
import { coordinatesOf, type Degrees, type GenerationDegrees, rankOf, worldSize } from './parallel.js';
import { addBytes, type ByteCount, type PlacedShard, placeShard, tensorBytes } from './placed.js';
import { receivedBytes, type Slice } from './reshard-plan.js';
import { shardTable } from './shards.js';

/** A training shard in a generation buffer. */
export interface Slot {
  /** The shard is that of this rank, of the same training replica. */
  rank: number;
  /** Bytes from the beginning of the buffer. */
  offset: number;
  /** Of its tensors. */
  bytes: ByteCount;
}

/** What a rank keeps in training: its shard, or its ZeRO-3 piece of it. */
export interface TrainingMemory {
  /** Where it lies in the generation buffer; undefined: it has memory of its own. */
  slotOffset: number | undefined;
  /** Alignment included. */
  arenaBytes: number;
  /** Of its tensors. */
  bytes: ByteCount;
}

export interface RankTransition {
  training: TrainingMemory;
  slots: readonly Slot[];
  /** Indices of the slots that make up the generation shard. */
  generationSlots: readonly number[];
  /** Of the generation buffer, alignment included. */
  bufferBytes: number;
}

export interface TransitionPlan {
  engine: TransitionEngine;
  ranks: readonly RankTransition[];
  /** Source offsets count from the source's training memory, destination offsets from the generation buffer. */
  slices: readonly Slice[];
}

/** One rank's line of Table 2, in bytes of tensors. */
export interface TransitionBytes {
  receive: ByteCount;
  peak: ByteCount;
  redundant: ByteCount;
}

const alignment = 64;
/** How each engine lays its generation groups. */
export const groupings: Record<TransitionEngine, Grouping> = {
  'ds-chat': 'vanilla',
  'hybridflow-v': 'vanilla',
  hybridflow: 'hybridflow',
};

/** A run of a tensor that a rank keeps in training. */
interface Kept {
  tensor: string;
  /** In the training memory, and in the shard. */
  offset: number;
  shardOffset: number;
  bytes: number;
  replicatedBytes: number;
}

interface KeptMemory {
  tensors: Kept[];
  arenaBytes: number;
}

export interface TransitionOptions {
  shape: ModelShape;
  /** From `resolveParts`. */
  parts: number;
  dtype: Dtype;
  train: Degrees;
  generation: GenerationDegrees;
  engine: TransitionEngine;
}

class TransitionPlanner {
  private readonly world: number;
  private readonly shardCount: number;
  private readonly shards: PlacedShard[];
  private readonly kept: KeptMemory[];

  constructor(private readonly options: TransitionOptions) {
    const { shape, parts, dtype, train, engine } = options;
    this.world = worldSize(train);
    this.shardCount = train.pipeline * train.tensor;
    this.shards = Array.from({ length: this.shardCount }, (_, rank) =>
      placeShard(shardTable(shape, parts, train, rank), dtype),
    );
    this.kept = Array.from({ length: this.world }, (_, rank) => {
      const shard = this.shardOf(rank);
      return engine === 'ds-chat'
        ? keptPieces(shard, coordinatesOf(rank, train).data, train.data)
        : keptPieces(shard, 0, 1);
    });
  }

  private shardOf(rank: number): PlacedShard {
    return this.shards[rank % this.shardCount] as PlacedShard;
  }

  private keptBy(rank: number): KeptMemory {
    return this.kept[rank] as KeptMemory;
  }

  plan(): TransitionPlan {
    const { train, generation, engine } = this.options;
    const groups = generationGroups(train, generation, groupings[engine]);
    const slices: Slice[] = [];
    const ranks = Array.from({ length: this.world }, (_, rank) => {
      const first = rank - (rank % this.shardCount);
      const replica = Array.from({ length: this.shardCount }, (_, i) => first + i);
      const micro = groups.microData.find((group) => group.includes(rank)) as number[];
      const { slots, bufferBytes } = this.slots(engine === 'hybridflow' ? micro : replica);
      for (const slot of slots) this.gather(slot, rank, slices);
      const own = slots.find((slot) => slot.rank === rank);
      const { tensors, arenaBytes } = this.keptBy(rank);
      return {
        training: {
          slotOffset: engine === 'hybridflow' ? own?.offset : undefined,
          arenaBytes,
          bytes: keptBytes(tensors),
        },
        slots,
        generationSlots: this.generationSlots(rank, slots),
        bufferBytes,
      };
    });
    return { engine, ranks, slices };
  }

  private slots(members: readonly number[]): { slots: Slot[]; bufferBytes: number } {
    let bufferBytes = 0;
    const slots = members.map((rank) => {
      const shard = this.shardOf(rank);
      const slot = { rank, offset: bufferBytes, bytes: addBytes(shard.tensors.map(tensorBytes)) };
      bufferBytes += shard.arenaBytes;
      return slot;
    });
    return { slots, bufferBytes };
  }

  /** Fills a slot of `rank` from whoever keeps the shard or its pieces. */
  private gather(slot: Slot, rank: number, slices: Slice[]): void {
    const { engine, train } = this.options;
    if (engine === 'hybridflow' && slot.rank === rank) return;
    const at = coordinatesOf(slot.rank, train);
    const sources =
      engine === 'ds-chat'
        ? Array.from({ length: train.data }, (_, data) => rankOf({ ...at, data }, train))
        : [slot.rank];
    for (const sourceRank of sources) {
      for (const kept of this.keptBy(sourceRank).tensors) {
        slices.push({
          tensor: kept.tensor,
          sourceRank,
          sourceOffset: kept.offset,
          destinationRank: rank,
          destinationOffset: slot.offset + kept.shardOffset,
          bytes: kept.bytes,
          replicatedBytes: kept.replicatedBytes,
        });
      }
    }
  }

  private generationSlots(rank: number, slots: readonly Slot[]): number[] {
    const { train, generation, engine } = this.options;
    const place = placeInGeneration(rank, train, generation, groupings[engine]);
    const m = train.pipeline / generation.pipeline;
    const k = train.tensor / generation.tensor;
    return slots.flatMap((slot, index) => {
      const { pipeline, tensor } = coordinatesOf(slot.rank, train);
      const inside = Math.floor(pipeline / m) === place.pipeline && Math.floor(tensor / k) === place.tensor;
      return inside ? [index] : [];
    });
  }
}

const keptBytes = (tensors: readonly Kept[]): ByteCount => ({
  sharded: tensors.reduce((sum, { bytes, replicatedBytes }) => sum + bytes - replicatedBytes, 0),
  replicated: tensors.reduce((sum, { replicatedBytes }) => sum + replicatedBytes, 0),
});

/** Piece `index` of `count` of each tensor, as equal as whole elements allow; one piece is the shard as it lies. */
function keptPieces(shard: PlacedShard, index: number, count: number): KeptMemory {
  let end = 0;
  const tensors = shard.tensors.flatMap((placed): Kept[] => {
    const { tensor, offset, elementBytes } = placed;
    const before = (bytes: number, piece: number): number =>
      Math.floor(((bytes / elementBytes) * piece) / count) * elementBytes;
    const { sharded, replicated } = tensorBytes(placed);
    const begin = before(sharded + replicated, index);
    const bytes = before(sharded + replicated, index + 1) - begin;
    const replicatedBytes = before(replicated, index + 1) - before(replicated, index);
    const at = count === 1 ? offset : end;
    end = Math.ceil((at + bytes) / alignment) * alignment;
    if (bytes === 0) return [];
    return [{ tensor: tensor.name, offset: at, shardOffset: offset + begin, bytes, replicatedBytes }];
  });
  return { tensors, arenaBytes: end };
}

/** @throws PARALLEL_INVALID when p_g does not divide p or t_g does not divide t, and as `shardTable` */
export function transitionPlan(options: TransitionOptions): TransitionPlan {
  return new TransitionPlanner(options).plan();
}

/** Table 2 counted from a plan: what each rank receives, holds in its buffer, and holds in training memory beside it. */
export function transitionBytes({ slices, ranks }: TransitionPlan): TransitionBytes[] {
  const received = receivedBytes(slices, ranks.length);
  return ranks.map(({ slots, training }, rank) => ({
    receive: received[rank] as ByteCount,
    peak: addBytes(slots.map(({ bytes }) => bytes)),
    redundant: training.slotOffset === undefined ? training.bytes : { sharded: 0, replicated: 0 },
  }));
}
