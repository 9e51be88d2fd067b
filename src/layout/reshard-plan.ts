/**
 * A reshard is data: a list of slices that an executor runs, a counter adds up and a test checks. This is the general plan,
 * between any two layouts of one model at equal `numerics.parts`; `transitionPlan` is the 3D-HybridEngine's.
 */
import { LockstepError } from '../errors.js';
import { type ByteCount, blockBytes, blockOffsets, type PlacedShard, type PlacedTensor, runsOfRows } from './placed.js';
import type { Block } from './shards.js';
import type { Range } from './stages.js';

/** Bytes that move from a rank's memory to another's, or inside one rank. Offsets count from the beginning of its shard. */
export interface Slice {
  tensor: string;
  sourceRank: number;
  sourceOffset: number;
  destinationRank: number;
  destinationOffset: number;
  /** Of one run. */
  bytes: number;
  /** Runs at equal distances, in bytes; absent: one. */
  runs?: { count: number; sourceStride: number; destinationStride: number };
  /** Of all bytes, how many belong to rows that the destination's layout replicates. */
  replicatedBytes: number;
}

export const sliceBytes = ({ bytes, runs }: Slice): number => bytes * (runs?.count ?? 1);

/** What each of `ranks` ranks receives from others. */
export function receivedBytes(slices: readonly Slice[], ranks: number): ByteCount[] {
  const received = Array.from({ length: ranks }, () => ({ sharded: 0, replicated: 0 }));
  for (const slice of slices) {
    if (slice.sourceRank === slice.destinationRank) continue;
    const count = received[slice.destinationRank] as ByteCount;
    count.sharded += sliceBytes(slice) - slice.replicatedBytes;
    count.replicated += slice.replicatedBytes;
  }
  return received;
}

/** A block of a tensor on some rank. */
interface Home {
  rank: number;
  placed: PlacedTensor;
  index: number;
  block: Block;
  offset: number;
}

const rangeKey = ({ begin, end }: Range): string => `${begin}-${end}`;
/** Equal for blocks that hold the same of a tensor. */
export const blockKey = (block: Block): string => `${block.rows.map(rangeKey).join(' ')} of ${rangeKey(block.columns)}`;

function homesOf({ tensors }: PlacedShard, rank: number): Home[] {
  return tensors.flatMap((placed) => {
    const offsets = blockOffsets(placed);
    return placed.tensor.blocks.map((block, index) => ({
      rank,
      placed,
      index,
      block,
      offset: offsets[index] as number,
    }));
  });
}

class Planner {
  private readonly slices: Slice[] = [];
  /** Homes of each tensor's blocks, by what they hold. */
  private readonly sources = new Map<string, Map<string, Home[]>>();

  constructor(source: readonly PlacedShard[]) {
    source.forEach((shard, rank) => {
      for (const home of homesOf(shard, rank)) {
        const { name } = home.placed.tensor;
        const blocks = this.sources.get(name) ?? new Map<string, Home[]>();
        this.sources.set(name, blocks);
        const key = blockKey(home.block);
        const same = blocks.get(key);
        if (same) same.push(home);
        else blocks.set(key, [home]);
      }
    });
  }

  plan(destination: readonly PlacedShard[]): Slice[] {
    destination.forEach((shard, rank) => {
      for (const home of homesOf(shard, rank)) this.fill(home);
    });
    return this.slices;
  }

  /** The rank itself where it is among them, else one of the others, so that ranks with equal shards share the sending. */
  private choose(homes: readonly Home[], rank: number): Home | undefined {
    return homes.find((home) => home.rank === rank) ?? homes[rank % homes.length];
  }

  private fill(to: Home): void {
    const blocks = this.sources.get(to.placed.tensor.name);
    const any = blocks?.values().next().value?.[0];
    if (any !== undefined && any.placed.elementBytes !== to.placed.elementBytes) throw otherElements(any, to);
    const from = this.choose(blocks?.get(blockKey(to.block)) ?? [], to.rank);
    const bytes = blockBytes(to.placed)[to.index] as ByteCount;
    if (from) this.copyBlock(from, to, bytes);
    else this.fillRows(to, [...(blocks?.values() ?? [])].flat());
  }

  private copyBlock(from: Home, to: Home, { sharded, replicated }: ByteCount): void {
    if (sharded + replicated === 0) return;
    const slice: Slice = {
      tensor: to.placed.tensor.name,
      sourceRank: from.rank,
      sourceOffset: from.offset,
      destinationRank: to.rank,
      destinationOffset: to.offset,
      bytes: sharded + replicated,
      replicatedBytes: replicated,
    };
    const last = this.slices.at(-1);
    if (last && continues(last, slice)) {
      last.bytes += slice.bytes;
      last.replicatedBytes += slice.replicatedBytes;
    } else this.slices.push(slice);
  }

  /** A block that no rank holds as it is: its key/value head lies with other query heads. Ranges of rows move by themselves. */
  private fillRows(to: Home, homes: readonly Home[]): void {
    let row = 0;
    const before = to.placed.tensor.blocks.slice(0, to.index).reduce((sum, block) => sum + rowsIn(block), 0);
    for (const range of to.block.rows) {
      const holders = homes.filter((home) => rowOf(home.block, range, to.block.columns) !== undefined);
      const from = this.choose(holders, to.rank);
      if (from === undefined) throw missing(to, range);
      const sourceRow = rowOf(from.block, range, to.block.columns) as number;
      const copied = to.placed.tensor.copies.some(({ begin, end }) => before + row >= begin && before + row < end);
      const count = range.end - range.begin;
      for (let done = 0; done < count; ) {
        done += this.copyRuns(from, sourceRow + done, to, row + done, count - done, copied);
      }
      row += count;
    }
  }

  /** Copies rows up to the end of a panel on either side; says how many. */
  private copyRuns(from: Home, sourceRow: number, to: Home, row: number, limit: number, copied: boolean): number {
    const target = runsOfRows(to.placed, to.index, row, limit);
    const source = runsOfRows(from.placed, from.index, sourceRow, target.rows);
    const { bytes, count, rows } = source;
    this.slices.push({
      tensor: to.placed.tensor.name,
      sourceRank: from.rank,
      sourceOffset: from.offset + source.offset,
      destinationRank: to.rank,
      destinationOffset: to.offset + target.offset,
      bytes,
      ...(count > 1 && { runs: { count, sourceStride: source.stride, destinationStride: target.stride } }),
      replicatedBytes: copied ? bytes * count : 0,
    });
    return rows;
  }
}

const rowsIn = ({ rows }: Block): number => rows.reduce((sum, { begin, end }) => sum + end - begin, 0);

/** Where in the block a range of rows of the whole tensor begins; undefined when the block lacks any of it. */
function rowOf(block: Block, range: Range, columns: Range): number | undefined {
  if (rangeKey(block.columns) !== rangeKey(columns)) return undefined;
  let row = 0;
  for (const { begin, end } of block.rows) {
    if (range.begin >= begin && range.end <= end) return row + range.begin - begin;
    row += end - begin;
  }
  return undefined;
}

/** The next slice begins where this one ends, on both sides. */
function continues(last: Slice, next: Slice): boolean {
  return (
    last.runs === undefined &&
    last.tensor === next.tensor &&
    last.sourceRank === next.sourceRank &&
    last.destinationRank === next.destinationRank &&
    last.sourceOffset + last.bytes === next.sourceOffset &&
    last.destinationOffset + last.bytes === next.destinationOffset
  );
}

function missing({ rank, placed }: Home, { begin, end }: Range): LockstepError {
  const message =
    `Rank ${rank} needs rows ${begin}..${end - 1} of tensor "${placed.tensor.name}", and no source rank holds them all. ` +
    'Both layouts must be of one model, cut into the same numerics.parts, and the source must be complete.';
  return new LockstepError('RESHARD_INCOMPLETE', message, { rank, tensor: placed.tensor.name, begin, end });
}

function otherElements(from: Home, to: Home): LockstepError {
  const [{ elementBytes: received, tensor }, { elementBytes: expected }] = [from.placed, to.placed];
  const message =
    `Tensor "${tensor.name}" has elements of ${received} bytes on the source's side and of ${expected} on the ` +
    "destination's: a plan moves bytes and does not convert. Place both in one dtype.";
  return new LockstepError('RESHARD_DTYPE', message, { tensor: tensor.name, expected, received });
}

/**
 * Slices that fill every element of the destination's shards from the source's: whole parts where the source has them, which
 * joined are as few as the layouts allow, rows of them where a shared key/value head lies otherwise (`shardTable`).
 * Index r of either list is rank r; equal numbers are one memory space.
 * @throws RESHARD_INCOMPLETE
 */
export function reshardPlan(source: readonly PlacedShard[], destination: readonly PlacedShard[]): Slice[] {
  return new Planner(source).plan(destination);
}
