/**
 * Generation's weights inside the slots of its buffer (`transitionPlan`): a tensor is a view of the training shards, part by
 * part where each lies (native/kernels/weight.h, `Part.offset`). What cannot be a view is staged: put together behind the
 * slots by copies inside the rank. That is a vector whose rows lie in several slots, and a part whose training shard has rows
 * behind its own in the same panel (a copy of a key/value head that several ranks shared).
 */
import { generationStages, placeInGeneration } from './hybrid-engine.js';
import { coordinatesOf, type Degrees } from './parallel.js';
import { blockBytes, blockOffsets, type PlacedShard, type PlacedTensor, placeShard } from './placed.js';
import { blockKey, reshardPlan, type Slice } from './reshard-plan.js';
import { type Block, type ShardTensor, shardTable } from './shards.js';
import type { Range } from './stages.js';
import { groupings, type TransitionOptions, type TransitionPlan } from './transition-plan.js';

/** Where a tensor lies in a memory that others use too. */
export interface WeightPlace {
  /** Bytes from the memory's beginning. */
  weights: number;
  /** From there to the end of the last part. */
  elements: number;
  /** First element of each part, from there on; absent: one part follows the other. */
  partOffsets?: number[];
}

export interface GenerationView {
  /** Of one generation replica: degrees, this rank in it, and the layers of its stages. */
  degrees: Degrees;
  rank: number;
  stages: readonly Range[];
  table: readonly ShardTensor[];
  /** One per tensor of the table. */
  places: readonly WeightPlace[];
  staging: Staging;
  /** The buffer with what is staged behind it. */
  memoryBytes: number;
}

/** Tensors that are put together for generation, beside the slots. */
export interface Staging {
  tensors: readonly string[];
  bytes: number;
  /** Inside the rank's memory: both offsets count from its beginning; ranks are slots, and 0. */
  slices: readonly Slice[];
}

const alignment = 64;
const panel = 64;

interface Found {
  /** Bytes from the beginning of the buffer. */
  offset: number;
  bytes: number;
}

const rowsIn = ({ rows }: Block): number => rows.reduce((sum, { begin, end }) => sum + end - begin, 0);

/** The block begins with the rows of `wanted`, and they end with a panel: nothing behind them changes where they lie. */
function beginsWith(block: Block, wanted: Block): boolean {
  const first = { rows: block.rows.slice(0, wanted.rows.length), columns: block.columns };
  return blockKey(first) === blockKey(wanted) && rowsIn(wanted) % panel === 0;
}

class Viewer {
  private readonly homes = new Map<string, PlacedTensor[]>();

  constructor(slots: readonly PlacedShard[]) {
    for (const placed of slots.flatMap(({ tensors }) => tensors)) {
      const homes = this.homes.get(placed.tensor.name);
      if (homes) homes.push(placed);
      else this.homes.set(placed.tensor.name, [placed]);
    }
  }

  /** Undefined: the tensor has to be staged. */
  view({ tensor, elementBytes }: PlacedTensor): WeightPlace | undefined {
    const found: Found[] = [];
    for (const block of tensor.blocks) {
      const at = this.find(tensor, block);
      if (at === undefined) return undefined;
      found.push(at);
    }
    const begin = Math.min(...found.map(({ offset }) => offset));
    const elements = (Math.max(...found.map(({ offset, bytes }) => offset + bytes)) - begin) / elementBytes;
    if (tensor.kind === 'matrix') {
      return { weights: begin, elements, partOffsets: found.map(({ offset }) => (offset - begin) / elementBytes) };
    }
    return elements === tensor.elements ? { weights: begin, elements } : undefined;
  }

  private find(wanted: ShardTensor, block: Block): Found | undefined {
    for (const placed of this.homes.get(wanted.name) ?? []) {
      const { tensor, elementBytes } = placed;
      const index = tensor.blocks.findIndex(
        (held) => blockKey(held) === blockKey(block) || (wanted.kind === 'matrix' && beginsWith(held, block)),
      );
      if (index < 0) continue;
      const alone: PlacedTensor = { tensor: { ...wanted, blocks: [block], copies: [] }, offset: 0, elementBytes };
      const bytes = blockBytes(alone)[0]?.sharded ?? 0;
      return { offset: blockOffsets(placed)[index] as number, bytes };
    }
    return undefined;
  }
}

/** The training shards in a rank's generation slots, placed in its buffer. */
function generationShards(options: TransitionOptions, plan: TransitionPlan, rank: number): PlacedShard[] {
  const { shape, parts, dtype, train } = options;
  const { slots, generationSlots } = plan.ranks[rank] as TransitionPlan['ranks'][number];
  return generationSlots.map((index) => {
    const slot = slots[index] as (typeof slots)[number];
    const shard = placeShard(shardTable(shape, parts, train, slot.rank), dtype);
    return {
      ...shard,
      tensors: shard.tensors.map((placed) => ({ ...placed, offset: placed.offset + slot.offset })),
    };
  });
}

/**
 * How `rank` reads its generation weights in the buffer that the plan gives it.
 * @throws PARALLEL_INVALID, RANK_INVALID
 */
export function generationView(options: TransitionOptions, plan: TransitionPlan, rank: number): GenerationView {
  const { shape, parts, dtype, train, generation } = options;
  coordinatesOf(rank, train);
  const degrees = { ...generation, data: 1 };
  const stages = generationStages(shape.layers, train, generation);
  const at = placeInGeneration(rank, train, generation, groupings[plan.engine]);
  const inReplica = at.pipeline * generation.tensor + at.tensor;
  const table = shardTable(shape, parts, degrees, inReplica, stages);
  const slots = generationShards(options, plan, rank);
  const viewer = new Viewer(slots);
  let end = (plan.ranks[rank] as TransitionPlan['ranks'][number]).bufferBytes;
  const staged: PlacedTensor[] = [];
  const places = placeShard(table, dtype).tensors.map((placed): WeightPlace => {
    const view = viewer.view(placed);
    if (view) return view;
    const { tensor, elementBytes } = placed;
    staged.push({ tensor, elementBytes, offset: end });
    end += Math.ceil((tensor.elements * elementBytes) / alignment) * alignment;
    return { weights: (staged.at(-1) as PlacedTensor).offset, elements: tensor.elements };
  });
  return {
    ...{ degrees, rank: inReplica, stages, table, places },
    staging: {
      tensors: staged.map(({ tensor }) => tensor.name),
      bytes: staged.reduce((sum, { tensor, elementBytes }) => sum + tensor.elements * elementBytes, 0),
      slices: reshardPlan(slots, [{ tensors: staged, arenaBytes: end }]),
    },
    memoryBytes: end,
  };
}
