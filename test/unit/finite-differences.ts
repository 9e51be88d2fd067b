/** Derivatives by central differences, and their comparison with those of a formula. */
import { expect } from 'vitest';

/** Points are to lie 10 h away from kinks. */
const h = 1e-6;

/** Central differences of f at x, for the entries whose mask is not 0. */
export function differences(f: (x: number[]) => number, x: number[], learned: number[]): number[] {
  return x.map((_, t) => {
    if (!learned[t]) return 0;
    const at = (step: number) => f(x.map((value, i) => (i === t ? value + step : value)));
    return (at(h) - at(-h)) / (2 * h);
  });
}

export function expectSame(derivative: ArrayLike<number>, difference: number[]): void {
  expect(derivative.length).toBe(difference.length);
  const scale = Math.max(1, ...difference.map(Math.abs));
  difference.forEach((want, t) => {
    expect(Math.abs(derivative[t]! - want) / scale, `entry ${t}: ${derivative[t]} instead of ${want}`).toBeLessThan(
      1e-7,
    );
  });
}
