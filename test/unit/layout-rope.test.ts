import { describe, expect, test } from 'vitest';
import { parseModelConfig } from '../../src/layout/config.js';
import { ropeFrequencies, ropeTables } from '../../src/layout/rope.js';

const shapeWith = (rope: Record<string, unknown>, more: Record<string, unknown> = {}) =>
  parseModelConfig(
    {
      model_type: 'llama',
      vocab_size: 32,
      hidden_size: 128,
      intermediate_size: 64,
      num_hidden_layers: 1,
      num_attention_heads: 2,
      max_position_embeddings: 512,
      rope_theta: 10000,
      rope_scaling: rope,
      ...more,
    },
    'config.json',
  );

const pairs = 32;
const base = Array.from({ length: pairs }, (_, i) => Math.exp((-i / pairs) * Math.log(10000)));

function frequenciesOf(rope: Record<string, unknown>): { frequencies: number[]; magnitude: number } {
  const { positions } = shapeWith(rope);
  if (positions.type !== 'rope') throw new Error('no rope');
  const { frequencies, magnitude } = ropeFrequencies(positions.theta, 2 * pairs, positions.scaling);
  return { frequencies: [...frequencies], magnitude };
}

function expectClose(actual: number[], expected: number[]): void {
  expect(actual.length).toBe(expected.length);
  for (const [i, value] of expected.entries()) expect(Math.abs(actual[i]! / value - 1)).toBeLessThan(1e-12);
}

describe('frequencies', () => {
  test('without scaling: theta^(-2i/K)', () => {
    expectClose(frequenciesOf({ rope_type: 'default' }).frequencies, base);
    expectClose(frequenciesOf({ rope_type: 'dynamic', factor: 4 }).frequencies, base);
  });

  test('linear: divided by the factor', () => {
    const { frequencies, magnitude } = frequenciesOf({ rope_type: 'linear', factor: 3 });
    expectClose(
      frequencies,
      base.map((f) => f / 3),
    );
    expect(magnitude).toBe(1);
  });

  test('llama3: short wavelengths kept, long ones divided, blended between, all three regimes present', () => {
    const rope = { factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 64 };
    const { frequencies } = frequenciesOf({ rope_type: 'llama3', ...rope });
    const turns = base.map((f) => (64 * f) / (2 * Math.PI)); // within the original length
    const expected = base.map((f, i) => {
      const kept = Math.min(Math.max((turns[i]! - 1) / (4 - 1), 0), 1);
      return f * (kept + (1 - kept) / 8);
    });
    expectClose(frequencies, expected);
    expect(new Set(turns.map((t) => (t < 1 ? 'long' : t > 4 ? 'short' : 'blend'))).size).toBe(3);
  });

  test.each([true, false])('yarn: a ramp between the pairs of betaFast and betaSlow turns, truncate %s', (truncate) => {
    const rope = { rope_type: 'yarn', factor: 4, original_max_position_embeddings: 128, truncate };
    const { frequencies, magnitude } = frequenciesOf(rope);
    const pairAt = (turns: number) => (pairs * Math.log(128 / (2 * Math.PI * turns))) / Math.log(10000);
    const [first, last] = [pairAt(32), pairAt(1)];
    expect(first).toBeLessThan(0); // clamped below
    const low = 0;
    const high = truncate ? Math.ceil(last) : last;
    const expected = base.map((f, i) => {
      const interpolated = i <= low ? 0 : i >= high ? 1 : (i - low) / (high - low);
      return interpolated * (f / 4) + (1 - interpolated) * f;
    });
    expectClose(frequencies, expected);
    expect(magnitude).toBeCloseTo(1.1386294361119891, 14); // 0.1 ln 4 + 1
  });
});

describe('tables', () => {
  test('are cos and sin of position times frequency, rounded once, with the attention factor on both', () => {
    const shape = shapeWith({
      rope_type: 'yarn',
      factor: 4,
      original_max_position_embeddings: 128,
      attention_factor: 1.25,
    });
    if (shape.positions.type !== 'rope') throw new Error('no rope');
    const { frequencies } = ropeFrequencies(shape.positions.theta, 64, shape.positions.scaling);
    const { cosine, sine } = ropeTables(shape, 300);
    expect([cosine.length, sine.length]).toEqual([300 * pairs, 300 * pairs]);
    for (const position of [0, 1, 17, 299]) {
      for (const pair of [0, 1, 15, 31]) {
        const angle = position * frequencies[pair]!;
        expect(cosine[position * pairs + pair]).toBe(Math.fround(1.25 * Math.cos(angle)));
        expect(sine[position * pairs + pair]).toBe(Math.fround(1.25 * Math.sin(angle)));
      }
    }
  });

  test('a longer table begins with the shorter one', () => {
    const shape = shapeWith({ rope_type: 'linear', factor: 2 });
    expect(ropeTables(shape, 400).sine.subarray(0, 100 * pairs)).toEqual(ropeTables(shape, 100).sine);
  });

  test('beyond the model they are refused, dynamic with its reason; learned positions have none', () => {
    expect(() => ropeTables(shapeWith({ rope_type: 'default' }), 513)).toThrow(/513 positions.*512 positions/);
    expect(() => ropeTables(shapeWith({ rope_type: 'dynamic', factor: 2 }), 513)).toThrow(/"dynamic".*original length/);
    const gpt2 = { model_type: 'gpt2', vocab_size: 8, n_embd: 8, n_layer: 1, n_head: 2, n_positions: 16 };
    expect(ropeTables(parseModelConfig(gpt2, 'config.json'), 16).cosine.length).toBe(0);
  });
});
