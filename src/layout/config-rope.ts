/** The rotary embedding of a config.json, in either style: `rope_theta` + `rope_scaling`, or `rope_parameters`. */
import { ConfigFields } from './config-fields.js';
import type { RopeScaling } from './model-shape.js';

const defaultTheta = 10000;

export interface RopeConfig {
  theta: number;
  scaling: RopeScaling;
}

/**
 * @param maxLength `max_position_embeddings`
 * @throws MODEL_UNSUPPORTED for a rope type without an implementation, MODEL_CONFIG_INVALID for malformed fields.
 */
export function parseRope(fields: ConfigFields, maxLength: number): RopeConfig {
  const rope =
    fields.object('rope_scaling') ?? fields.object('rope_parameters') ?? new ConfigFields({}, `${fields.where}: rope`);
  const theta =
    rope.get('rope_theta') === undefined ? fields.positive('rope_theta', defaultTheta) : rope.positive('rope_theta');
  const partial = rope.get('partial_rotary_factor');
  if (partial !== undefined && partial !== 1) throw rope.unsupported('partial_rotary_factor', '1');
  if (rope.get('mrope_section') !== undefined) throw rope.unsupported('mrope_section', 'absent');
  for (const [key, value] of Object.entries(rope.json)) {
    if (typeof value === 'object' && value !== null && 'rope_type' in value) {
      throw rope.unsupported(key, 'the same rotation in every layer');
    }
  }
  return { theta, scaling: parseScaling(fields, rope, maxLength) };
}

function parseScaling(fields: ConfigFields, rope: ConfigFields, maxLength: number): RopeScaling {
  const key = rope.get('rope_type') === undefined ? 'type' : 'rope_type';
  const type = rope.string(key, 'default');
  // A length beside the rope fields takes precedence, as in transformers (Phi-3 stores it there).
  const holder = fields.get('original_max_position_embeddings') === undefined ? rope : fields;
  const originalLength = holder.integer('original_max_position_embeddings', maxLength);
  switch (type) {
    case 'default':
      return { type };
    case 'linear':
      return { type, factor: rope.positive('factor') };
    case 'dynamic':
      return { type, originalLength: Math.min(originalLength, maxLength) };
    case 'llama3': {
      const factor = rope.positive('factor');
      const lowFrequencyFactor = rope.positive('low_freq_factor');
      const highFrequencyFactor = rope.positive('high_freq_factor');
      if (highFrequencyFactor <= lowFrequencyFactor) {
        throw rope.invalid('high_freq_factor', `more than low_freq_factor (${lowFrequencyFactor})`);
      }
      return { type, factor, lowFrequencyFactor, highFrequencyFactor, originalLength };
    }
    case 'yarn':
      return parseYarn(rope, originalLength, maxLength);
    default:
      throw rope.unsupported(key, 'default, linear, llama3, yarn, dynamic');
  }
}

/** YaRN (Peng et al. 2023), §3.4 for the attention factor; `mscale` and `mscale_all_dim` are DeepSeek's variant of it. */
function parseYarn(rope: ConfigFields, originalLength: number, maxLength: number): RopeScaling {
  const factor = rope.positive('factor', maxLength / originalLength);
  const magnitude = (scale: number) => (factor <= 1 ? 1 : 0.1 * scale * Math.log(factor) + 1);
  const number = (key: string): number => {
    const value = rope.get(key);
    if (value === undefined) return 0;
    if (!Number.isFinite(value)) throw rope.invalid(key, 'a number');
    return value as number;
  };
  const mscale = number('mscale');
  const mscaleAllDim = number('mscale_all_dim');
  const inferred = mscale && mscaleAllDim ? magnitude(mscale) / magnitude(mscaleAllDim) : magnitude(1);
  return {
    type: 'yarn',
    factor,
    betaFast: number('beta_fast') || 32,
    betaSlow: number('beta_slow') || 1,
    originalLength,
    attentionFactor: rope.positive('attention_factor', inferred),
    truncate: rope.boolean('truncate', true),
  };
}
