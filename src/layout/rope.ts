/**
 * Rotary position embedding (Su et al. 2021) and its context extensions: linear interpolation (Chen et al. 2023), YaRN
 * (Peng et al. 2023), Llama 3.1's frequency bands. Everything is computed in float64 and rounded once.
 */
import { LockstepError } from '../errors.js';
import { explainPositionLimit } from './config.js';
import type { ModelShape, RopeScaling } from './model-shape.js';

export interface RopeTables {
  /** cos(position * frequency), row-major [positions, K / 2] */ cosine: Float32Array;
  /** sin(position * frequency), row-major [positions, K / 2] */ sine: Float32Array;
}

/** Radians per position of the K / 2 pairs of a head, and the factor on cos and sin (YaRN's attention factor, else 1). */
export interface RopeFrequencies {
  frequencies: Float64Array;
  magnitude: number;
}

type Scaling<T extends RopeScaling['type']> = Extract<RopeScaling, { type: T }>;

/** f_i = theta^(-2i/K), then scaled. */
export function ropeFrequencies(theta: number, headWidth: number, scaling: RopeScaling): RopeFrequencies {
  const base = Float64Array.from({ length: headWidth / 2 }, (_, i) => theta ** ((-2 * i) / headWidth));
  switch (scaling.type) {
    case 'default':
    case 'dynamic': // identical up to the original length, where maxPositions ends
      return { frequencies: base, magnitude: 1 };
    case 'linear':
      return { frequencies: base.map((f) => f / scaling.factor), magnitude: 1 };
    case 'llama3':
      return { frequencies: base.map((f) => llama3Frequency(f, scaling)), magnitude: 1 };
    case 'yarn':
      return { frequencies: yarnFrequencies(base, theta, headWidth, scaling), magnitude: scaling.attentionFactor };
  }
}

/** Long wavelengths are interpolated, short ones kept, a linear blend between. */
function llama3Frequency(frequency: number, scaling: Scaling<'llama3'>): number {
  const { factor, lowFrequencyFactor: low, highFrequencyFactor: high, originalLength } = scaling;
  const wavelength = (2 * Math.PI) / frequency;
  if (wavelength < originalLength / high) return frequency;
  if (wavelength > originalLength / low) return frequency / factor;
  const blend = (originalLength / wavelength - low) / (high - low);
  return ((1 - blend) * frequency) / factor + blend * frequency;
}

/** YaRN §3.2: pairs that turn more than betaFast times within the original length are kept, less than betaSlow interpolated. */
function yarnFrequencies(base: Float64Array, theta: number, headWidth: number, scaling: Scaling<'yarn'>): Float64Array {
  const pairOfTurns = (turns: number) =>
    (headWidth * Math.log(scaling.originalLength / (turns * 2 * Math.PI))) / (2 * Math.log(theta));
  let low = pairOfTurns(scaling.betaFast);
  let high = pairOfTurns(scaling.betaSlow);
  if (scaling.truncate) {
    low = Math.floor(low);
    high = Math.ceil(high);
  }
  low = Math.max(low, 0);
  high = Math.min(high, headWidth - 1);
  if (low === high) high += 0.001; // the ramp's slope stays finite
  return base.map((f, i) => {
    const interpolated = Math.min(Math.max((i - low) / (high - low), 0), 1);
    return (f / scaling.factor) * interpolated + f * (1 - interpolated);
  });
}

/**
 * Tables for positions 0 .. positions - 1; empty for a model without rotation.
 * @throws SEQUENCE_TOO_LONG when `positions` exceeds the model's.
 */
export function ropeTables(shape: ModelShape, positions: number): RopeTables {
  if (shape.positions.type !== 'rope') return { cosine: new Float32Array(0), sine: new Float32Array(0) };
  if (positions > shape.maxPositions) {
    const message = `Asked for ${positions} positions, but ${explainPositionLimit(shape)}. Use shorter sequences.`;
    throw new LockstepError('SEQUENCE_TOO_LONG', message, { expected: shape.maxPositions, received: positions });
  }
  const { frequencies, magnitude } = ropeFrequencies(shape.positions.theta, shape.headWidth, shape.positions.scaling);
  const pairs = frequencies.length;
  const cosine = new Float32Array(positions * pairs);
  const sine = new Float32Array(positions * pairs);
  for (let position = 0; position < positions; position++) {
    for (let pair = 0; pair < pairs; pair++) {
      const angle = position * (frequencies[pair] as number);
      cosine[position * pairs + pair] = magnitude * Math.cos(angle);
      sine[position * pairs + pair] = magnitude * Math.sin(angle);
    }
  }
  return { cosine, sine };
}
