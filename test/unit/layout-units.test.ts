/** Units of parameters: every tensor belongs to one, and what is used at the same time does not lie in the same place. */
import { expect, test } from 'vitest';
import { planModel } from '../../src/layout/memory-plan.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { shardTable } from '../../src/layout/shards.js';
import { type ParameterUnit, parameterUnits, planUnits } from '../../src/layout/units.js';
import { tinyShape } from '../native/support.js';

const shape: ModelShape = { ...tinyShape, layers: 5, windows: [0, 0, 0, 0, 0] };
const tied: ModelShape = { ...shape, tied: true };
const whole = { pipeline: 1, tensor: 1, data: 2 };

/** Bytes begin .. end - 1 of a buffer of the plan, [0, 0] of one that it does not have. */
function rangeOf(plan: ReturnType<typeof planUnits>, name: string): [number, number] {
  const index = plan.names.indexOf(name);
  return index < 0 ? [0, 0] : [plan.offsets[index]!, plan.offsets[index]! + plan.bytes[index]!];
}

const apart = ([a, aEnd]: [number, number], [b, bEnd]: [number, number]): boolean => aEnd <= b || bEnd <= a;

test('units: every tensor once, layers in order, a tied embedding read at both ends', () => {
  for (const each of [shape, tied]) {
    for (const rank of [0, 1]) {
      const table = shardTable(each, 1, { pipeline: 2, tensor: 1, data: 1 }, rank);
      const units = parameterUnits(table, rank === 0 ? 3 : 2);
      expect(units.flatMap(({ tensors }) => tensors)).toEqual(table.map((_, index) => index));
      expect(units.map(({ weights }) => weights)).toEqual(units.map(({ tensors }) => tensors));
      expect(units[rank === 0 ? units.length - 1 : 0]!.tensors).toEqual([]);
    }
  }
  const units = parameterUnits(shardTable(tied, 1, whole, 0), 5);
  expect(units.at(-1)!.weights).toEqual([...units.at(-1)!.tensors, 0]);
});

test('buckets: closed when they have as many bytes as asked for, from the last unit on', () => {
  const table = shardTable(shape, 1, whole, 0);
  const buckets = (bytes: number) => parameterUnits(table, 5, bytes).map(({ bucket }) => bucket);
  expect(buckets(1)).toEqual([6, 5, 4, 3, 2, 1, 0]);
  expect(buckets(2 ** 40)).toEqual([0, 0, 0, 0, 0, 0, 0]);
  const layer = planModel(
    table.filter(({ name }) => name.startsWith('layers.0.')),
    'float32',
    true,
  ).gradientBytes;
  expect(buckets(layer + 64)).toEqual([3, 2, 2, 1, 1, 0, 0]);
});

test.each(['float32', 'bfloat16'] as const)('buffers that are used together lie apart, %s', (dtype) => {
  for (const each of [shape, tied]) {
    const table = shardTable(each, 1, whole, 0);
    for (const bucketBytes of [1, 300_000, 2 ** 40]) {
      const units = parameterUnits(table, 5, bucketBytes);
      const plan = planUnits(table, units, dtype, 3, 'training');
      const weights = units.map((_, unit) => rangeOf(plan, `weights.${unit}`));
      const gradients = units.map((_, unit) => rangeOf(plan, `gradients.${unit}`));
      const second = rangeOf(plan, 'secondGradient');
      expect(second[1] > 0).toBe(each.tied);
      const neighbours = (a: ParameterUnit, b: ParameterUnit) => Math.abs(a.bucket - b.bucket) <= 1;
      for (let a = 0; a < units.length; a++) {
        for (let b = 0; b < units.length; b++) {
          if (Math.abs(a - b) === 1) expect(apart(weights[a]!, weights[b]!), `weights ${a} ${b}`).toBe(true);
          expect(apart(weights[a]!, gradients[b]!), `weights ${a}, gradients ${b}`).toBe(true);
          if (a !== b && neighbours(units[a]!, units[b]!)) {
            expect(apart(gradients[a]!, gradients[b]!), `gradients ${a} ${b}`).toBe(true);
          }
        }
        if (each.tied) expect(apart(gradients[a]!, second) && apart(weights[a]!, second)).toBe(true);
      }
      expect(Math.max(...plan.offsets.map((offset, i) => offset + plan.bytes[i]!))).toBe(plan.total);
    }
  }
});

test('what a stage does not divide has no buffer', () => {
  const table = shardTable(tied, 1, whole, 0);
  const units = parameterUnits(table, 5);
  for (const zero of [0, 1]) expect(planUnits(table, units, 'float32', zero, 'training').total).toBe(0);
  const names = planUnits(table, units, 'float32', 2, 'training').names.map((name) => name.split('.')[0]);
  expect([...new Set(names)]).toEqual(['gradients', 'secondGradient']);
  for (const use of ['scoring', 'generation'] as const) {
    expect(planUnits(table, units, 'float32', 2, use).total).toBe(0);
  }
  const all = planUnits(table, units, 'float32', 3, 'generation');
  expect(all.total).toBe(planModel(table, 'float32', false).weightsBytes);
});
