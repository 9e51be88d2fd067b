/**
 * The weights of all ranks between their training layout and their generation layout, by the plan of HybridFlow's Table 2
 * [2409.19256, section 5.4] (layout/transition-plan.ts). A rank has one memory, the generation buffer; with the engine
 * `hybridflow` its training shard is a slot of it. There: the other slots are gathered. Back: nothing moves, their pages go
 * back to the system and their bytes to the device's budget, where activations take them.
 */
import { LockstepError } from '../errors.js';
import { type GenerationView, generationView } from '../layout/generation-view.js';
import { placeShard } from '../layout/placed.js';
import type { Slice } from '../layout/reshard-plan.js';
import { shardTable } from '../layout/shards.js';
import { type TransitionOptions, type TransitionPlan, transitionPlan } from '../layout/transition-plan.js';
import { type Device, rethrow } from './device.js';
import {
  loadNative,
  type NativeMemory,
  type NativeTransfer,
  type NativeTransferOptions,
  type NativeWorld,
  type Timed,
} from './native.js';
import type { WeightsIn } from './rank-options.js';
import { together } from './together.js';

export interface TransitionSetup extends TransitionOptions {
  /** One per training rank: rank = (data x pipeline + stage) x tensor + place in the stage. */
  devices: readonly Device[];
  timeoutSeconds?: number;
  /** Weights that go to another rank are summed by who sends and who receives them, and by the sender once more on the way back. Default true. */
  checksums?: boolean;
}

/** One way there. */
export interface TransitionReport {
  /** Of the whole call. */
  seconds: number;
  /** Of the slowest rank: moving, and summing. */
  moveSeconds: number;
  checkSeconds: number;
  /** Of each rank, by the communicators' count. */
  receivedBytes: number[];
  sentBytes: number[];
}

/** Bytes reserved, the largest end used, and what the system keeps in memory now. */
export type MemoryMarks = ReturnType<NativeMemory['marks']>;

interface RankMemory {
  device: Device;
  buffer: NativeMemory;
  /** Where the training shard lies: the buffer, or a memory of its own. */
  training: NativeMemory;
  trainingOffset: number;
  trainingBytes: number;
  /** Held while the buffer is filled. */
  gatheredBytes: number;
  /** Offsets and bytes of what is given back. */
  gathered: number[];
  transfer: NativeTransfer | undefined;
  staging: NativeTransfer | undefined;
}

const idle = { receivedBytes: 0, sentBytes: 0, moveSeconds: 0, checkSeconds: 0 };

/** Ranks that slices connect, ascending; a rank that nothing reaches is a group of one. */
export function transferGroups(slices: readonly Slice[], world: number): number[][] {
  const root = Array.from({ length: world }, (_, rank) => rank);
  const find = (rank: number): number => (root[rank] === rank ? rank : find(root[rank]!));
  for (const { sourceRank, destinationRank } of slices) root[find(sourceRank)] = find(destinationRank);
  const groups = new Map<number, number[]>();
  for (let rank = 0; rank < world; rank++) groups.set(find(rank), [...(groups.get(find(rank)) ?? []), rank]);
  return [...groups.values()].sort((a, b) => a[0]! - b[0]!);
}

/** Slices as the addon takes them, ranks being those of the group. */
export function nativeSlices(
  slices: readonly Slice[],
  ranks: readonly number[],
): Pick<NativeTransferOptions, 'ranks' | 'tensors' | 'slices'> {
  const tensors = [...new Set(slices.map(({ tensor }) => tensor))];
  const index = new Map(tensors.map((tensor, i) => [tensor, i]));
  const flat: number[] = [];
  for (const slice of slices) {
    const { count, sourceStride, destinationStride } = slice.runs ?? {
      count: 1,
      sourceStride: 0,
      destinationStride: 0,
    };
    flat.push(index.get(slice.tensor)!, ranks.indexOf(slice.sourceRank), ranks.indexOf(slice.destinationRank));
    flat.push(slice.sourceOffset, slice.destinationOffset, slice.bytes, count, sourceStride, destinationStride);
  }
  return { ranks: [...ranks], tensors, slices: flat };
}

export class Transition {
  readonly plan: TransitionPlan;
  /** How each rank reads its generation weights. */
  readonly views: readonly GenerationView[];
  /** Groups of ranks whose slices run as one all-gather. */
  gathers = 0;
  private readonly ranks: RankMemory[] = [];
  private readonly memories: NativeMemory[] = [];
  private readonly checksums: boolean;
  private inGeneration = false;
  private closed = false;

  /** @throws PARALLEL_INVALID, PARTS_INVALID, RANKS_INVALID, MEMORY_BUDGET */
  constructor(private readonly setup: TransitionSetup) {
    this.plan = transitionPlan(setup);
    this.checksums = setup.checksums ?? true;
    const { devices } = setup;
    if (devices.length !== this.plan.ranks.length) {
      const message = `The layout takes ${this.plan.ranks.length} devices, one per rank; received ${devices.length}.`;
      throw new LockstepError('RANKS_INVALID', message, { expected: this.plan.ranks.length, received: devices.length });
    }
    this.views = devices.map((_, rank) => generationView(setup, this.plan, rank));
    try {
      for (const [rank, device] of devices.entries()) this.ranks.push(this.allocate(rank, device));
      this.connect();
    } catch (error) {
      this.close();
      throw error;
    }
  }

  private allocate(rank: number, device: Device): RankMemory {
    const { training } = this.plan.ranks[rank]!;
    const { memoryBytes } = this.views[rank]!;
    const { slotOffset: own, arenaBytes } = training;
    device.hold(this.views[rank]!, arenaBytes, 'The weights of a rank');
    const memory = (name: string, bytes: number): NativeMemory => {
      const made = rethrow(() => new (loadNative().Memory)({ name, bytes, device: device.native }));
      this.memories.push(made);
      return made;
    };
    const buffer = memory('generation', memoryBytes);
    const after = own === undefined ? 0 : own + arenaBytes;
    return {
      device,
      buffer,
      training: own === undefined ? memory('training', arenaBytes) : buffer,
      trainingOffset: own ?? 0,
      trainingBytes: arenaBytes,
      gatheredBytes: memoryBytes - (own === undefined ? 0 : arenaBytes),
      gathered: [0, own ?? 0, after, memoryBytes - after],
      transfer: undefined,
      staging: undefined,
    };
  }

  /** Makes every rank's part of the plan. */
  private connect(): void {
    const { timeoutSeconds = 300 } = this.setup;
    const slices = this.plan.slices.map((slice) => ({
      ...slice,
      sourceOffset: slice.sourceOffset + this.ranks[slice.sourceRank]!.trainingOffset,
    }));
    for (const group of transferGroups(slices, this.ranks.length)) {
      const inside = slices.filter(({ destinationRank }) => group.includes(destinationRank));
      if (inside.length === 0) continue;
      const lists = nativeSlices(inside, group);
      const world = worldOf(group.length, timeoutSeconds);
      for (const [i, rank] of group.entries()) {
        const { device, training, buffer } = this.ranks[rank]!;
        const options = {
          ...lists,
          source: training,
          destination: buffer,
          ...(world && { group: { world, rank: i } }),
        };
        this.ranks[rank]!.transfer = rethrow(() => new (loadNative().Transfer)(device.native, options));
      }
      if (this.ranks[group[0]!]!.transfer?.gathers) this.gathers += 1;
    }
    for (const [rank, { staging }] of this.views.entries()) {
      if (staging.slices.length === 0) continue;
      const { device, buffer } = this.ranks[rank]!;
      // Slots and what is staged lie in one memory.
      const inside = staging.slices.map((slice) => ({ ...slice, sourceRank: rank, destinationRank: rank }));
      const options = { ...nativeSlices(inside, [rank]), source: buffer, destination: buffer };
      this.ranks[rank]!.staging = rethrow(() => new (loadNative().Transfer)(device.native, options));
    }
  }

  /**
   * Where the training model of a rank has its weights.
   * @throws RANKS_UNSUPPORTED for `ds-chat` over several data ranks, which keep pieces of tensors
   */
  trainingWeights(rank: number): WeightsIn {
    const { shape, parts, dtype, train, engine } = this.setup;
    if (engine === 'ds-chat' && train.data > 1) {
      const message = `The transition ds-chat keeps ZeRO-3 pieces on ${train.data} data ranks, which no model trains on in this version; use hybridflow.`;
      throw new LockstepError('RANKS_UNSUPPORTED', message, { engine, data: train.data });
    }
    const { training, trainingOffset } = this.ranks[rank]!;
    const places = placeShard(shardTable(shape, parts, train, rank), dtype).tensors.map(({ tensor, offset }) => ({
      weights: offset + trainingOffset,
      elements: tensor.elements,
    }));
    return { memory: training, places };
  }

  /** Where the generation model of a rank reads its weights, after `enter`. */
  generationWeights(rank: number): WeightsIn {
    return { memory: this.ranks[rank]!.buffer, places: this.views[rank]!.places };
  }

  /** The training shard of a rank, byte by byte; for tests and benches. */
  trainingMemory(rank: number): { memory: NativeMemory; offset: number; bytes: number } {
    const { training, trainingOffset, trainingBytes } = this.ranks[rank]!;
    return { memory: training, offset: trainingOffset, bytes: trainingBytes };
  }

  /** The generation buffer of a rank; for tests and benches. */
  buffer(rank: number): NativeMemory {
    return this.ranks[rank]!.buffer;
  }

  get entered(): boolean {
    return this.inGeneration;
  }

  /**
   * Fills the generation buffers. Needs the budget of what is gathered on every device, which the workspace gives.
   * @throws MEMORY_BUDGET, before anything moves; WEIGHTS_DIFFER; what ends a world
   */
  async enter(): Promise<TransitionReport> {
    const start = performance.now();
    this.holdGathered();
    this.inGeneration = true;
    try {
      await together(this.ranks.map(({ device }) => device.shrinkWorkspace()));
      const all = await this.run(
        ({ transfer }) => transfer,
        (transfer) => transfer.run(this.checksums),
      );
      await this.run(
        ({ staging }) => staging,
        (staging) => staging.run(false),
      );
      const results = all.map((result) => result ?? idle);
      return {
        seconds: (performance.now() - start) / 1000,
        moveSeconds: Math.max(...results.map(({ moveSeconds }) => moveSeconds)),
        checkSeconds: Math.max(...results.map(({ checkSeconds }) => checkSeconds)),
        receivedBytes: results.map(({ receivedBytes }) => receivedBytes),
        sentBytes: results.map(({ sentBytes }) => sentBytes),
      };
    } catch (error) {
      await this.giveBack();
      throw error;
    }
  }

  /**
   * Back to training, which finds its shard where it was.
   * @throws WEIGHTS_CHANGED when it is not as it was sent
   */
  async leave(): Promise<void> {
    if (!this.inGeneration) return;
    try {
      if (this.checksums)
        await this.run(
          ({ transfer }) => transfer,
          (transfer) => transfer.verify(),
        );
    } finally {
      await this.giveBack();
    }
  }

  private holdGathered(): void {
    const held: RankMemory[] = [];
    try {
      for (const rank of this.ranks) {
        rank.device.hold(rank.gathered, rank.gatheredBytes, 'A generation buffer');
        held.push(rank);
      }
    } catch (error) {
      for (const { device, gathered } of held) device.release(gathered);
      throw error;
    }
  }

  /** A device that was closed has given back everything already. */
  private async giveBack(): Promise<void> {
    this.inGeneration = false;
    await Promise.allSettled(
      this.ranks.map(async ({ buffer, device, gathered }) => buffer.discard(device.native, gathered)),
    );
    for (const { device, gathered } of this.ranks) device.release(gathered);
  }

  /** On every rank that has such a list of slices; undefined of the others. */
  private run<T>(
    listOf: (rank: RankMemory) => NativeTransfer | undefined,
    call: (list: NativeTransfer) => Promise<Timed<T>>,
  ): Promise<(T | undefined)[]> {
    const one = async (rank: RankMemory): Promise<T | undefined> => {
      const list = listOf(rank);
      return list && rank.device.run('transition', () => call(list));
    };
    return together(this.ranks.map(one));
  }

  /** Of every rank: its buffer, and its training memory where that is one of its own. */
  memory(): { buffer: MemoryMarks; training: MemoryMarks | undefined }[] {
    return this.ranks.map(({ buffer, training }) => ({
      buffer: buffer.marks(),
      training: training === buffer ? undefined : training.marks(),
    }));
  }

  close(): void {
    if (this.closed) return;
    this.closed = true;
    for (const rank of this.ranks) {
      rank.transfer?.close();
      rank.staging?.close();
      rank.device.release(rank.gathered);
    }
    for (const memory of this.memories) memory.close();
    for (const [rank, device] of this.setup.devices.entries()) device.release(this.views[rank]!);
  }
}

/** Nothing for a group of one. */
export function worldOf(ranks: number, timeoutSeconds: number): NativeWorld | undefined {
  return ranks === 1 ? undefined : rethrow(() => new (loadNative().World)({ ranks, timeoutSeconds }));
}
