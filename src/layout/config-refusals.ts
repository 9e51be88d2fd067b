/**
 * Keys of config.json that change what a model computes and that no supported family has. A checkpoint that sets one is
 * refused; other unknown keys are harmless.
 */
import type { ConfigFields } from './config-fields.js';

/** Refused unless absent, null, false, 0 or empty. */
const mustBeOff = [
  'add_cross_attention',
  'alibi',
  'attention_chunk_size',
  'attention_multiplier',
  'attention_sinks',
  'attn_logit_softcapping',
  'clip_qkv',
  'cross_attention_layers',
  'dim_model_base',
  'embedding_multiplier',
  'final_logit_softcapping',
  'first_k_dense_replace',
  'is_encoder_decoder',
  'logit_scale',
  'logits_scaling',
  'lm_head_multiplier',
  'mrope_section',
  'multi_query',
  'n_routed_experts',
  'no_rope_layers',
  'num_experts',
  'num_local_experts',
  'parallel_attn',
  'pruned_heads',
  'qk_layernorm',
  'qk_norm',
  'quantization_config',
  'query_pre_attn_scalar',
  'residual_multiplier',
  'rope_interleaved',
  'rope_local_base_freq',
  'scale_attn_by_inverse_layer_idx',
  'scale_depth',
  'scale_emb',
  'scale_embedding',
  'sliding_window_pattern',
  'use_bidirectional_attention',
  'use_mrope',
  'use_parallel_residual',
  'use_qk_norm',
] as const;

/** Refused unless absent, null or 1. */
const mustBeOne = ['partial_rotary_factor', 'rope_pct', 'rotary_pct', 'rotary_percent'] as const;

/** Refused unless absent, null or true. */
const mustBeOn = ['is_causal', 'scale_attn_weights'] as const;

/** Multipliers in `mustBeOff` that are also off at 1. */
const multipliers: ReadonlySet<string> = new Set([
  'attention_multiplier',
  'embedding_multiplier',
  'lm_head_multiplier',
  'logit_scale',
  'logits_scaling',
  'residual_multiplier',
  'scale_emb',
]);

const isOff = (value: unknown): boolean =>
  value === undefined ||
  value === false ||
  value === 0 ||
  (typeof value === 'object' && value !== null && Object.keys(value).length === 0);

/** @throws MODEL_UNSUPPORTED naming the first such key, its value and the file. */
export function refuseUnsupportedFields(fields: ConfigFields, norm: 'rms' | 'layer'): void {
  for (const key of mustBeOff) {
    const value = fields.get(key);
    if (!isOff(value) && !(multipliers.has(key) && value === 1)) throw fields.unsupported(key, 'absent');
  }
  for (const key of mustBeOne)
    if (![undefined, 1].includes(fields.get(key) as number)) throw fields.unsupported(key, '1');
  for (const key of mustBeOn) if (fields.get(key) === false) throw fields.unsupported(key, 'true');

  const normName = norm === 'rms' ? /^rms_?norm$/i : /^layer_?norm$/i;
  for (const key of ['norm_type', 'layer_norm_type', 'normalization_type']) {
    const value = fields.get(key);
    if (value !== undefined && !(typeof value === 'string' && normName.test(value))) {
      throw fields.unsupported(key, norm === 'rms' ? '"rmsnorm"' : '"layernorm"');
    }
  }
  const positions = norm === 'rms' ? ['rope', 'rotary'] : ['absolute', 'learned'];
  const type = fields.get('position_embedding_type');
  if (type !== undefined && !positions.includes(type as string)) {
    throw fields.unsupported('position_embedding_type', `"${positions[0]}"`);
  }
}
