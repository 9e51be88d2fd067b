/**
 * The models of a run in one region in turn: before a call what it needs is on the device, and what must leave has left; beside it
 * the rest of the plan's moves go on. Moving changes no bit: a run is the same with and without it.
 */
import type { Engine } from '../engine/engine.js';
import { type ModelState, moveState, type StateMove, type StatePlace } from '../engine/model-state.js';
import { type Exchange, type RotationPlan, stateGroups } from '../layout/rotation.js';
import { opening } from './phases.js';
import type { Lane } from './recorder.js';
import type { Role } from './roles.js';

export class Rotation {
  readonly #plan: RotationPlan;
  readonly #place: 'host' | 'file';
  readonly #recorder: Lane;
  readonly #states = new Map<string, readonly ModelState[]>();
  /** Groups on the device once the moves under way have ended. */
  #present: ReadonlySet<string> = new Set();
  #beside: Promise<void> = Promise.resolve();

  constructor(plan: RotationPlan, place: 'host' | 'file', recorder: Lane) {
    this.#plan = plan;
    this.#place = place;
    this.#recorder = recorder;
  }

  /** Makes a model where there is room for all of it. */
  async open<E extends Engine>(role: Role['name'], create: () => Promise<E>): Promise<E> {
    await this.enter(opening(role));
    const engine = await create();
    this.#states.set(role, engine.states ?? []);
    this.#present = new Set([...this.#present, ...stateGroups.map((group) => `${role} ${group}`)]);
    return engine;
  }

  /**
   * Returns when the phase can start.
   * @throws what moving throws, also that beside the phase before
   */
  async enter(phase: string): Promise<void> {
    await this.#recorder.phase('offload', async () => {
      await this.#beside;
      const { before, beside, present } = this.#plan.transition(
        this.#present,
        phase,
        new Set([...this.#states.keys()]),
      );
      this.#present = present;
      await this.#carryOut(before);
      this.#beside = this.#carryOut(beside);
      // Whoever comes next hears of it.
      this.#beside.catch(() => undefined);
    });
  }

  async #carryOut(exchange: Exchange): Promise<void> {
    const moves = [
      ...exchange.away.map((group) => ({ ...group, place: group.group === 'gradients' ? 'dropped' : this.#place })),
      ...exchange.back.map((group) => ({ ...group, place: 'device' as const })),
    ].flatMap(({ model, group, place }) =>
      this.#states.get(model)!.map((state): StateMove => ({ state, places: { [group]: place as StatePlace } })),
    );
    if (moves.length === 0) return;
    const names = (label: string, groups: Exchange['away']) => groups.map(({ key }) => `${label} ${key}`);
    const name = [...names('evict', exchange.away), ...names('restore', exchange.back)].join(', ');
    const before = this.#counts();
    await this.#recorder.phase(name, () => moveState(moves), 'transfer');
    for (const [metric, total] of Object.entries(this.#counts())) {
      this.#recorder.add(metric, total - before[metric]!);
    }
  }

  /** Over all models so far, under the names of metrics. */
  #counts(): Record<string, number> {
    const totals: Record<string, number> = { 'bytes.offload': 0, 'bytes.restore': 0, 'bytes.dropped': 0 };
    for (const state of [...this.#states.values()].flat()) {
      for (const counts of Object.values(state.counts())) {
        totals['bytes.offload']! += counts.offloadBytes;
        totals['bytes.restore']! += counts.restoreBytes;
        totals['bytes.dropped']! += counts.droppedBytes;
      }
    }
    return totals;
  }
}
