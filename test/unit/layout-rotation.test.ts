/** The rotation's plan: every phase has what it needs within the budget, nothing moves without need, and only there and back. */
import { describe, expect, test } from 'vitest';
import {
  largestPhase,
  offloadChunkBytes,
  type Phase,
  type RotatingModel,
  RotationPlan,
  stateGroups,
} from '../../src/layout/rotation.js';

const MiB = 2 ** 20;
const trained = (name: string, size: number): RotatingModel => ({
  name,
  bytes: { parameters: size, gradients: 2 * size, optimizer: 6 * size },
});
const frozen = (name: string, size: number): RotatingModel => ({
  name,
  bytes: { parameters: size, gradients: 0, optimizer: 0 },
});
const models = [trained('policy', 20 * MiB), trained('critic', 16 * MiB), frozen('reference', 20 * MiB)];
const phase = (name: string, model: string, groups: Phase['groups'], workspace: number): Phase => ({
  ...{ name, model, groups },
  workspaceBytes: workspace * MiB,
});
const phases: Phase[] = [
  { ...phase('generation', 'policy', ['parameters'], 10), wishedBytes: 100 * MiB },
  phase('values', 'critic', ['parameters'], 8),
  phase('reference', 'reference', ['parameters'], 8),
  phase('valueUpdate', 'critic', stateGroups, 30),
  phase('policyUpdate', 'policy', stateGroups, 35),
  { ...phase('hold policy', 'policy', ['parameters', 'optimizer'], 0), rare: true },
  { ...phase('evaluation', 'policy', ['parameters'], 10), rare: true },
];
const least = largestPhase({ models, phases }).bytes;
const all = models.reduce((sum, { bytes }) => sum + bytes.parameters + bytes.gradients + bytes.optimizer, 0);
const sizes = new Map<string, number>(
  models.flatMap(({ name, bytes }) => stateGroups.map((group) => [`${name} ${group}`, bytes[group]] as const)),
);
const sum = (keys: Iterable<string>): number => [...keys].reduce((total, key) => total + sizes.get(key)!, 0);
const budgets = [least, least + 1, least + 30 * MiB, least + 90 * MiB, all, all + 200 * MiB];
const common = phases.filter(({ rare }) => !rare).map(({ name }) => name);

/** Phases in their order with rare ones between, then at random. */
function walk(): string[] {
  const names = phases.map(({ name }) => name);
  const random = Array.from({ length: 200 }, (_, i) => names[Math.imul(i + 1, 2654435761) % names.length]!);
  return [...common, ...common, 'hold policy', ...common, 'evaluation', ...common, ...random].filter(Boolean);
}

test('the largest phase decides what is needed', () => {
  expect(least).toBe((9 * 20 + 35) * MiB);
  expect(largestPhase({ models, phases }).phase.name).toBe('policyUpdate');
});

describe.each(budgets)('a budget of %d bytes', (budgetBytes) => {
  const plan = new RotationPlan({ models, phases, budgetBytes });

  test('has room for the residents of every phase, its needs among them, and for its workspace', () => {
    for (const { name, model, groups, workspaceBytes } of phases) {
      const residents = plan.residents(name);
      for (const group of groups) expect([...residents]).toContain(`${model} ${group}`);
      expect(sum(residents) + workspaceBytes).toBeLessThanOrEqual(budgetBytes);
    }
  });

  test('is never exceeded, in whatever order phases come, nor are the host bytes', () => {
    let present: ReadonlySet<string> = new Set(plan.residents('generation'));
    const held = new Set(present);
    const moved = (key: string) => !key.endsWith('gradients');
    for (const name of walk()) {
      const { before, beside, present: next } = plan.transition(present, name);
      for (const [exchange, workspace] of [
        [before, 0],
        [beside, plan.phase(name).workspaceBytes],
      ] as const) {
        expect(sum(held) + workspace).toBeLessThanOrEqual(budgetBytes);
        for (const { key } of exchange.away) expect(held.delete(key)).toBe(true);
        for (const { key } of exchange.back) {
          expect(held.has(key)).toBe(false);
          held.add(key);
        }
        expect(sum(held) + workspace).toBeLessThanOrEqual(budgetBytes);
        const away = sum([...sizes.keys()].filter((key) => moved(key) && !held.has(key)));
        expect(away).toBeLessThanOrEqual(plan.hostBytes);
        if (exchange !== before) continue;
        const { model, groups } = plan.phase(name);
        for (const group of groups) expect([...held]).toContain(`${model} ${group}`);
      }
      expect([...held].sort()).toEqual([...next].sort());
      present = next;
    }
  });

  test('what comes back ahead stays until it is needed', () => {
    common.forEach((name, i) => {
      const before = plan.residents(common.at(i - 1)!);
      for (const { key, model, group } of plan.transition(before, name).beside.back) {
        const round = [...common.slice(i + 1), ...common.slice(0, i + 1)];
        const use = round.findIndex((each) => {
          const other = plan.phase(each);
          return other.model === model && other.groups.includes(group);
        });
        for (const each of round.slice(0, use < 0 ? round.length : use))
          expect([...plan.residents(each)]).toContain(key);
      }
    });
  });
});

test('with room for everything nothing moves and the host keeps nothing', () => {
  const plan = new RotationPlan({ models, phases, budgetBytes: all + 100 * MiB });
  expect(plan.hostBytes).toBe(0);
  expect(plan.roundBytes).toEqual({ offload: 0, restore: 0, dropped: 0 });
  for (const name of walk()) {
    const { before, beside } = plan.transition(plan.residents('values'), name);
    expect([before, beside]).toEqual([
      { away: [], back: [] },
      { away: [], back: [] },
    ]);
  }
});

test('in the least memory a round moves both optimizers there and back, and drops both gradients', () => {
  const plan = new RotationPlan({ models, phases, budgetBytes: least });
  const { offload, restore, dropped } = plan.roundBytes;
  expect(dropped).toBe(2 * (20 + 16) * MiB);
  expect(offload).toBe(restore);
  expect(offload).toBeGreaterThanOrEqual(6 * (20 + 16) * MiB);
  expect(offload).toBeLessThanOrEqual(7 * (20 + 16) * MiB + 2 * 20 * MiB);
  const everything = (7 * (20 + 16) + 20) * MiB;
  expect(plan.hostBytes).toBeLessThanOrEqual(everything + 2 * offloadChunkBytes);
  // What the update of the policy leaves goes while the next rollout is sampled, and the critic comes meanwhile.
  const { before, beside } = plan.transition(plan.residents('policyUpdate'), 'generation');
  expect(before.back).toEqual([]);
  expect(beside.back.map(({ key }) => key)).toContain('critic parameters');
});

test('one byte less leaves the largest phase without room', () => {
  const plan = new RotationPlan({ models, phases, budgetBytes: least - 1 });
  const { workspaceBytes } = plan.phase('policyUpdate');
  expect(sum(plan.residents('policyUpdate')) + workspaceBytes).toBe(least);
});
