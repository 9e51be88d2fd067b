/**
 * Models of a run in one region in turn (docs/decisions/offload.md): which groups of state lie on the device while each call runs,
 * and what moves between two calls. Pure data, computed before anything is allocated: the preflight adds it up, the run carries
 * it out.
 *
 * A group is all of one kind of a model's state. What a call does not need stays on the device as long as there is room, the
 * soonest needed first, and only if there is room until it is needed; what is away comes back ahead of its call on the same terms.
 */

export const stateGroups = ['parameters', 'gradients', 'optimizer'] as const;
export type StateGroup = (typeof stateGroups)[number];

/** Bytes that an exchange moves at a time. */
export const offloadChunkBytes = 4 << 20;

export interface RotatingModel {
  name: string;
  bytes: Readonly<Record<StateGroup, number>>;
}

/** A call of the run. */
export interface Phase {
  name: string;
  model: string;
  /** What it needs on the device while it runs. */
  groups: readonly StateGroup[];
  /** Workspace that it cannot do without. */
  workspaceBytes: number;
  /** Workspace with which it runs best, where there is room for it; default: what it cannot do without. */
  wishedBytes?: number;
  /** Comes now and then between the others, which follow each other in their order, again and again. */
  rare?: boolean;
}

export interface GroupOfModel {
  /** `model group`. */
  key: string;
  model: string;
  group: StateGroup;
  bytes: number;
}

/** What leaves and what comes back, in their order. Gradients that leave are dropped: dead after a step, they are zero. */
export interface Exchange {
  away: GroupOfModel[];
  back: GroupOfModel[];
}

/** From one call to the next. */
export interface Moves {
  /** Before the call may start. */
  before: Exchange;
  /** While it runs. */
  beside: Exchange;
  /** On the device afterwards. */
  present: ReadonlySet<string>;
}

interface Settings {
  models: readonly RotatingModel[];
  phases: readonly Phase[];
  /** Of the device. */
  budgetBytes: number;
}

/** Device bytes of the phase that needs most: below them nothing helps. */
export function largestPhase({ models, phases }: Omit<Settings, 'budgetBytes'>): { phase: Phase; bytes: number } {
  const all = groupsOf(models);
  return phases
    .map((phase) => ({ phase, bytes: sum(needsOf(all, phase)) + phase.workspaceBytes }))
    .reduce((a, b) => (b.bytes > a.bytes ? b : a));
}

export class RotationPlan {
  readonly #settings: Settings;
  readonly #groups: readonly GroupOfModel[];
  readonly #common: readonly Phase[];
  /** On the device while a phase runs. */
  readonly #residents = new Map<string, ReadonlySet<string>>();

  /** The budget must hold the largest phase. */
  constructor(settings: Settings) {
    this.#settings = settings;
    this.#groups = groupsOf(settings.models);
    this.#common = settings.phases.filter(({ rare }) => !rare);
    const greedy = new Map(settings.phases.map((phase) => [phase.name, this.#greedy(phase)]));
    for (const phase of settings.phases) {
      const needs = keysOf(needsOf(this.#groups, phase));
      const kept = [...greedy.get(phase.name)!].filter((key) => needs.has(key) || this.#lasts(key, phase, greedy));
      this.#residents.set(phase.name, new Set(kept));
    }
  }

  phase(name: string): Phase {
    const phase = this.#settings.phases.find((each) => each.name === name);
    if (!phase) throw new RangeError(`the plan of the rotation has no phase '${name}'`);
    return phase;
  }

  /** Keys of the groups on the device while a phase runs. */
  residents(phase: string): ReadonlySet<string> {
    return this.#residents.get(this.phase(phase).name)!;
  }

  /** From what is on the device to a phase. Only groups of `opened` models (default: all) can come back. */
  transition(present: ReadonlySet<string>, to: string, opened?: ReadonlySet<string>): Moves {
    const phase = this.phase(to);
    const residents = this.residents(to);
    const needs = keysOf(needsOf(this.#groups, phase));
    // Gradients cost nothing to drop; of the others those go first that are needed last.
    const leaving = this.#bySoonest(phase)
      .reverse()
      .filter(({ key }) => present.has(key) && !residents.has(key))
      .sort((a, b) => Number(isGradient(b)) - Number(isGradient(a)));
    const coming = this.#bySoonest(phase).filter(
      ({ key, model }) => residents.has(key) && !present.has(key) && (opened?.has(model) ?? true),
    );
    const before: Exchange = { away: [], back: coming.filter(({ key }) => needs.has(key)) };
    const beside: Exchange = { away: [...leaving], back: coming.filter(({ key }) => !needs.has(key)) };
    // Also what a model that is opened in this phase brings.
    let held = sum(this.#groups.filter(({ key }) => present.has(key) || needs.has(key)));
    while (held > this.#room(phase) && beside.away.length > 0) {
      const group = beside.away.shift()!;
      before.away.push(group);
      held -= group.bytes;
    }
    const stays = [...present].filter((key) => residents.has(key));
    return { before, beside, present: new Set([...stays, ...coming.map(({ key }) => key)]) };
  }

  /** Most bytes that are away from the device, between any two phases and on the way, staging included; 0: nothing leaves. */
  get hostBytes(): number {
    const moved = this.#groups.filter((group) => !isGradient(group));
    let most = 0;
    for (const from of this.#settings.phases) {
      for (const to of this.#settings.phases) {
        const present = this.residents(from.name);
        const { before, beside } = this.transition(present, to.name);
        const away = sum(moved.filter(({ key }) => !present.has(key)));
        const then = away + sum(before.away.filter(isMoved)) - sum(before.back.filter(isMoved));
        const last = then + sum(beside.away.filter(isMoved)) - sum(beside.back.filter(isMoved));
        most = Math.max(most, away, then, last);
      }
    }
    if (most === 0) return 0;
    return most + 2 * Math.min(offloadChunkBytes, Math.max(...moved.map(({ bytes }) => bytes)));
  }

  /** What one round of the common phases moves once it goes round. */
  get roundBytes(): { offload: number; restore: number; dropped: number } {
    const bytes = { offload: 0, restore: 0, dropped: 0 };
    this.#common.forEach(({ name }, i) => {
      const { before, beside } = this.transition(this.residents(this.#common.at(i - 1)!.name), name);
      for (const { away, back } of [before, beside]) {
        bytes.offload += sum(away.filter(isMoved));
        bytes.restore += sum(back.filter(isMoved));
        bytes.dropped += sum(away.filter(isGradient));
      }
    });
    return bytes;
  }

  /** Device bytes for state in a phase: its workspace, as large as wished where the needs allow, is not for state. */
  #room(phase: Phase): number {
    const { budgetBytes } = this.#settings;
    const needs = sum(needsOf(this.#groups, phase));
    const wished = Math.min(phase.wishedBytes ?? phase.workspaceBytes, budgetBytes - needs);
    return budgetBytes - Math.max(phase.workspaceBytes, wished);
  }

  /** What a phase needs, and in the room that is left the groups needed soonest. */
  #greedy(phase: Phase): Set<string> {
    const needs = needsOf(this.#groups, phase);
    const keys = keysOf(needs);
    let room = this.#room(phase) - sum(needs);
    for (const { key, bytes } of this.#bySoonest(phase)) {
      if (keys.has(key) || bytes > room) continue;
      keys.add(key);
      room -= bytes;
    }
    return keys;
  }

  /** All groups, the soonest needed first; gradients, which are free to drop, last. */
  #bySoonest(phase: Phase): GroupOfModel[] {
    const distance = new Map(this.#groups.map((group) => [group.key, this.#distance(group, phase)]));
    return [...this.#groups].sort(
      (a, b) => Number(isGradient(a)) - Number(isGradient(b)) || distance.get(a.key)! - distance.get(b.key)!,
    );
  }

  /** Phases after a phase until one needs the group: 0 for the phase itself, a whole round when none does. */
  #distance(group: GroupOfModel, phase: Phase): number {
    if (needs(phase, group)) return 0;
    const after = this.#following(phase).findIndex((each) => needs(each, group));
    return after < 0 ? this.#common.length : after + 1;
  }

  /** The round of common phases that follows a phase. */
  #following(phase: Phase): Phase[] {
    const next = this.#common.indexOf(phase) + 1;
    return [...this.#common.slice(next), ...this.#common.slice(0, next)];
  }

  /** There is room for the group in every phase until one needs it. */
  #lasts(key: string, phase: Phase, greedy: ReadonlyMap<string, ReadonlySet<string>>): boolean {
    const group = this.#groups.find((each) => each.key === key)!;
    for (const each of this.#following(phase)) {
      if (needs(each, group)) return true;
      if (!greedy.get(each.name)!.has(key)) return false;
    }
    return true;
  }
}

function groupsOf(models: readonly RotatingModel[]): GroupOfModel[] {
  return models.flatMap(({ name, bytes }) =>
    stateGroups
      .filter((group) => bytes[group] > 0)
      .map((group) => ({ key: `${name} ${group}`, model: name, group, bytes: bytes[group] })),
  );
}

const needs = (phase: Phase, { model, group }: GroupOfModel): boolean =>
  phase.model === model && phase.groups.includes(group);
const needsOf = (groups: readonly GroupOfModel[], phase: Phase): GroupOfModel[] =>
  groups.filter((group) => needs(phase, group));
const keysOf = (groups: readonly GroupOfModel[]): Set<string> => new Set(groups.map(({ key }) => key));
const sum = (groups: readonly GroupOfModel[]): number => groups.reduce((total, { bytes }) => total + bytes, 0);
const isGradient = ({ group }: GroupOfModel): boolean => group === 'gradients';
const isMoved = (group: GroupOfModel): boolean => !isGradient(group);
