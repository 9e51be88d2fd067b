import { describe, expect, it } from 'vitest';
import { learningRateAt } from '../../src/train/schedule.js';

const rates = (schedule: 'constant' | 'linear' | 'cosine', warmupSteps: number, steps: number) =>
  Array.from({ length: steps }, (_, i) => learningRateAt(i + 1, { learningRate: 8, schedule, warmupSteps }, steps));

describe('the learning rate', () => {
  it('stays constant', () => expect(rates('constant', 0, 3)).toEqual([8, 8, 8]));
  it('warms up linearly and reaches the full rate at the last warm-up step', () =>
    expect(rates('constant', 4, 6)).toEqual([2, 4, 6, 8, 8, 8]));
  it('falls linearly towards the step after the last', () => {
    expect(rates('linear', 0, 4)).toEqual([8, 6, 4, 2]);
    expect(rates('linear', 2, 6)).toEqual([4, 8, 8, 6, 4, 2]);
  });
  it('falls along half a cosine', () => {
    const [first, second, third, fourth] = rates('cosine', 0, 4) as [number, number, number, number];
    expect(first).toBe(8);
    expect(second).toBeCloseTo(8 * (0.5 + Math.SQRT2 / 4), 12);
    expect(third).toBeCloseTo(4, 12);
    expect(fourth).toBeCloseTo(8 * (0.5 - Math.SQRT2 / 4), 12);
  });
  it('is finite when all steps are warm-up', () => expect(rates('cosine', 3, 3)).toEqual([8 / 3, 16 / 3, 8]));
});
