/**
 * A model's state by groups, each on the device or elsewhere. Moving is an exchange over the rank's transfer thread: what leaves
 * and what comes take turns in chunks, so that the device never holds more than before or after, and the rank computes meanwhile.
 * Calls and moves of a group happen in the order in which they are made; a call waits for nothing but the groups it needs.
 */
import { LockstepError } from '../errors.js';
import { offloadChunkBytes, type StateGroup, stateGroups } from '../layout/rotation.js';
import { type Booking, type Device, rethrow } from './device.js';
import type { NativeModel, NativeMove, NativeStateGroup } from './native.js';

export type { StateGroup } from '../layout/rotation.js';

/** `file` is one in the device's offload folder; only gradients that are zero can be `dropped`: they come back as zeroes. */
export type StatePlace = 'device' | 'host' | 'file' | 'dropped';

export type StatePlaces = Partial<Record<StateGroup, StatePlace>>;

/** What moving a group has cost so far; dropped bytes were not copied. */
export type TransferCounts = Omit<NativeStateGroup, 'place' | 'absentBytes'>;

type Change = NativeMove & { from: StatePlace };

/** One rank's share of a model's state. */
export class ModelState {
  /** Where each group is, or is going. */
  readonly places: Record<StateGroup, StatePlace> = { parameters: 'device', gradients: 'device', optimizer: 'device' };
  private issued = 0;
  private failed = false;

  constructor(
    readonly device: Device,
    /** Under which the device holds the bytes. */
    readonly owner: object,
    readonly native: NativeModel,
    readonly bytes: Readonly<Record<StateGroup, number>>,
  ) {}

  /** @throws LockstepError STATE_NOT_ON_DEVICE */
  require(groups: readonly StateGroup[], what: string): void {
    for (const group of groups) {
      // A group without bytes is wherever it is wanted.
      if (this.places[group] === 'device' || this.bytes[group] === 0) continue;
      const message = `${what} needs the model's ${group} on the device, and they are ${whereabouts[this.places[group]]}; move them back first.`;
      throw new LockstepError('STATE_NOT_ON_DEVICE', message, { group, place: this.places[group] });
    }
  }

  get deviceBytes(): number {
    return stateGroups.reduce((sum, group) => sum + (this.places[group] === 'device' ? this.bytes[group] : 0), 0);
  }

  /** Groups that are elsewhere than wanted. A group without bytes is wherever it is wanted. */
  changes(wanted: StatePlaces): Change[] {
    return stateGroups.flatMap((group) => {
      const from = this.places[group];
      const place = wanted[group] ?? from;
      return place === from || this.bytes[group] === 0 ? [] : [{ model: this.native, group, place, from }];
    });
  }

  counts(): Record<StateGroup, TransferCounts> {
    return rethrow(() => this.native.state());
  }

  /** Numbers an exchange. Those of a state are made and settle in the order of their numbers. */
  issue(): number {
    return ++this.issued;
  }

  /**
   * With the last exchange that was issued, when one has failed: where things are, and what the device holds of them. Until then
   * `places` says where the later ones bring them.
   */
  settle(exchange: number, failed: boolean): void {
    this.failed ||= failed;
    if (!this.failed || exchange < this.issued) return;
    this.failed = false;
    this.device.correct(this.owner, this.refresh());
  }

  private refresh(): number {
    const state = this.native.state();
    for (const group of stateGroups) if (this.bytes[group] > 0) this.places[group] = state[group].place;
    return stateGroups.reduce((sum, group) => sum + this.bytes[group] - state[group].absentBytes, 0);
  }
}

const whereabouts: Record<StatePlace, string> = {
  device: 'on the device',
  host: 'in host memory',
  file: 'in a file',
  dropped: 'dropped',
};

export interface StateMove {
  state: ModelState;
  places: StatePlaces;
}

/**
 * One exchange on each device that is concerned. Calls made from now on find the groups where they are wanted, and wait for those
 * that are on the way. After a failure every group is where `places` says, and can be moved again: nothing is lost.
 *
 * @throws LockstepError MEMORY_BUDGET (device or host), STATE_MOVE_INVALID, GRADIENTS_LIVE, OFFLOAD_FILE with path and cause
 */
export async function moveState(moves: readonly StateMove[]): Promise<void> {
  const devices = new Set(moves.map(({ state }) => state.device));
  const exchanges = [...devices].map((device) =>
    exchange(
      device,
      moves.filter(({ state }) => state.device === device),
    ),
  );
  const failed = (await Promise.allSettled(exchanges)).find((result) => result.status === 'rejected');
  if (failed) throw failed.reason;
}

async function exchange(device: Device, moves: readonly StateMove[]): Promise<void> {
  const before = moves.map(({ state }) => ({ ...state.places }));
  const changes = moves.flatMap(({ state, places }) => state.changes(places));
  if (changes.length === 0) return;
  for (const { state, places } of moves) Object.assign(state.places, places);
  const held = new Map(moves.map(({ state }) => [state.owner, state.deviceBytes]));
  let booked: Booking;
  try {
    booked = device.rehold(held);
  } catch (error) {
    for (const [i, { state }] of moves.entries()) Object.assign(state.places, before[i]);
    throw error;
  }
  const { workspaceBytes } = booked;
  const issued = moves.map(({ state }) => ({ state, number: state.issue() }));
  let failed = true;
  try {
    await device.run('move', () =>
      device.native.move({
        moves: changes.sort((a, b) => turn(a) - turn(b)).map(({ model, group, place }) => ({ model, group, place })),
        chunkBytes: offloadChunkBytes,
        folder: device.offloadFolder,
        ...(workspaceBytes === undefined ? {} : { workspaceBytes }),
      }),
    );
    failed = false;
  } finally {
    booked.end();
    for (const { state, number } of issued) state.settle(number, failed);
  }
}

/** What frees memory at no cost goes first, and what comes from nowhere last: the host holds the least meanwhile. */
const turn = ({ place, from }: Change): number => (place === 'dropped' ? 0 : from === 'dropped' ? 2 : 1);
