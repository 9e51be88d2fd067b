import { describe, expect, test } from 'vitest';
import { float32Array, float32ToString } from '../../src/cli/float32.js';

/** Float32 values of all sizes: every exponent, with mantissas from a small generator. */
function* values(count: number): Generator<number> {
  const bits = new Uint32Array(1);
  const view = new Float32Array(bits.buffer);
  let state = 1;
  for (let index = 0; index < count; index++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    bits[0] = state;
    if (Number.isFinite(view[0]!)) yield view[0]!;
  }
}

describe('float32 as text', () => {
  test('every number reads back to the same float32, as JSON', () => {
    let count = 0;
    for (const value of values(100_000)) {
      const read = JSON.parse(float32ToString(value)) as number;
      if (!Object.is(Math.fround(read), value)) expect(float32ToString(value)).toBe(value);
      count++;
    }
    expect(count).toBeGreaterThan(90_000);
  });

  test('no shorter decimal reads back to it', () => {
    for (const value of values(5_000)) {
      const digits = float32ToString(value)
        .replace(/e.*/, '')
        .replace(/[-.]/g, '')
        .replace(/^0+|0+$/g, '').length;
      for (let fewer = 1; fewer < digits; fewer++) {
        expect(Math.fround(Number(value.toPrecision(fewer)))).not.toBe(value);
      }
    }
  });

  test.each([
    [Math.fround(0.1), '0.1'],
    [Math.fround(-2.7654321), '-2.7654321'],
    [Math.fround(1 / 3), '0.33333334'],
    [16777216, '16777216'],
    [2 ** -149, '1e-45'],
    [Math.fround(3.4028234663852886e38), '3.4028235e+38'],
    [0, '0'],
    [-0, '-0'],
    [Number.NaN, 'null'],
    [Number.POSITIVE_INFINITY, 'null'],
  ])('%d is written %s', (value, written) => {
    expect(float32ToString(value)).toBe(written);
  });

  test('an array is a JSON array', () => {
    expect(float32Array(new Float32Array([0.1, -1.5]))).toBe('[0.1,-1.5]');
    expect(float32Array(new Float32Array())).toBe('[]');
  });
});
