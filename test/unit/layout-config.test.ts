import { describe, expect, test } from 'vitest';
import { LockstepError } from '../../src/errors.js';
import { explainPositionLimit, parseModelConfig, withHead } from '../../src/layout/config.js';

type Json = Record<string, unknown>;

const llama: Json = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_act: 'silu',
  vocab_size: 320,
  hidden_size: 64,
  intermediate_size: 176,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  max_position_embeddings: 256,
  rms_norm_eps: 1e-5,
  rope_theta: 5000,
  tie_word_embeddings: false,
  torch_dtype: 'float32',
};
const gpt2: Json = {
  architectures: ['GPT2LMHeadModel'],
  model_type: 'gpt2',
  vocab_size: 320,
  n_embd: 48,
  n_layer: 2,
  n_head: 3,
  n_positions: 128,
  n_inner: null,
  activation_function: 'gelu_new',
  layer_norm_epsilon: 1e-5,
};
const family = (name: string, className: string, more: Json = {}): Json => ({
  ...llama,
  model_type: name,
  architectures: [`${className}ForCausalLM`],
  ...more,
});
const mistral = (more: Json = {}) => family('mistral', 'Mistral', more);
const qwen2 = (more: Json = {}) => family('qwen2', 'Qwen2', more);
const qwen3 = (more: Json = {}) => family('qwen3', 'Qwen3', more);

const parse = (json: unknown) => parseModelConfig(json, 'folder/config.json');
function failure(json: unknown): LockstepError {
  try {
    parse(json);
  } catch (error) {
    if (LockstepError.isInstance(error)) return error;
    throw error;
  }
  throw new Error('the config was accepted');
}
const scalingOf = (json: Json) => {
  const { positions } = parse(json);
  return positions.type === 'rope' ? positions : undefined;
};

describe('families', () => {
  test('a Llama config gives its shape', () => {
    expect(parse(llama)).toEqual({
      family: 'llama',
      vocabulary: 320,
      width: 64,
      layers: 2,
      heads: 4,
      keyValueHeads: 2,
      headWidth: 16,
      feedForward: 176,
      norm: 'rms',
      normEpsilon: 1e-5,
      activation: 'swiglu',
      qkvBias: false,
      outputBias: false,
      mlpBias: false,
      headNorm: false,
      positions: { type: 'rope', theta: 5000, scaling: { type: 'default' } },
      maxPositions: 256,
      windows: [0, 0],
      head: 'language',
      headBias: false,
      tied: false,
      padToken: null,
    });
  });

  test('both styles of config.json give the same shape', () => {
    const { rope_theta: _, torch_dtype: __, ...rest } = llama;
    const newer = { ...rest, rope_parameters: { rope_theta: 5000, rope_type: 'default' }, dtype: 'float32' };
    expect(parse(newer)).toEqual(parse(llama));
    const scaling = { rope_type: 'linear', factor: 4 };
    expect(parse({ ...rest, rope_parameters: { rope_theta: 5000, ...scaling } })).toEqual(
      parse({ ...llama, rope_scaling: scaling }),
    );
    expect(parse({ ...llama, rope_scaling: { type: 'linear', factor: 4 } })).toEqual(
      parse({ ...llama, rope_scaling: scaling }),
    );
  });

  test('a GPT-2 config gives its shape: four times the width inside, tied, learned positions', () => {
    const shape = parse(gpt2);
    expect(shape).toMatchObject({ width: 48, heads: 3, keyValueHeads: 3, headWidth: 16, feedForward: 192, tied: true });
    expect(shape).toMatchObject({
      norm: 'layer',
      activation: 'gelu-tanh',
      positions: { type: 'learned' },
      maxPositions: 128,
    });
    expect(shape).toMatchObject({ qkvBias: true, outputBias: true, mlpBias: true });
    expect(parse({ ...gpt2, n_inner: 100 }).feedForward).toBe(100);
  });

  test('biases: Llama by its fields, Qwen2 on q, k and v only, Qwen3 by attention_bias', () => {
    const biases = (json: Json) => {
      const { qkvBias, outputBias, mlpBias } = parse(json);
      return [qkvBias, outputBias, mlpBias];
    };
    expect(biases({ ...llama, attention_bias: true })).toEqual([true, true, false]);
    expect(biases({ ...llama, mlp_bias: true })).toEqual([false, false, true]);
    expect(biases(qwen2())).toEqual([true, false, false]);
    expect(biases(qwen3())).toEqual([false, false, false]);
    expect(biases(qwen3({ attention_bias: true }))).toEqual([true, true, false]);
  });

  test('head width: head_dim when given, else hidden size / heads; Qwen3 has 128 when the key is absent', () => {
    expect(parse({ ...llama, head_dim: 32 }).headWidth).toBe(32);
    expect(parse({ ...llama, head_dim: null }).headWidth).toBe(16);
    expect(parse(qwen3()).headWidth).toBe(128);
    expect(parse(qwen3({ head_dim: 32 })).headWidth).toBe(32);
  });

  test('key/value heads: null is one per query head, an absent key the default of the family', () => {
    const { num_key_value_heads: _, ...rest } = llama;
    expect(parse(rest).keyValueHeads).toBe(4);
    expect(parse({ ...rest, num_key_value_heads: null }).keyValueHeads).toBe(4);
    const mistralHeads = { ...mistral({ num_attention_heads: 32 }) };
    delete mistralHeads.num_key_value_heads;
    expect(parse(mistralHeads).keyValueHeads).toBe(8);
  });
});

describe('sliding windows', () => {
  test('Mistral has one window for all layers, null is none, an absent key is 4096', () => {
    expect(parse(mistral({ sliding_window: 16 })).windows).toEqual([16, 16]);
    expect(parse(mistral({ sliding_window: null })).windows).toEqual([0, 0]);
    expect(parse(mistral()).windows).toEqual([4096, 4096]);
  });

  test('Qwen has windows only with use_sliding_window, from max_window_layers on or by layer_types', () => {
    const on = { use_sliding_window: true, sliding_window: 16 };
    expect(parse(qwen2({ sliding_window: 16, max_window_layers: 0 })).windows).toEqual([0, 0]);
    expect(parse(qwen2({ ...on, max_window_layers: 1 })).windows).toEqual([0, 16]);
    expect(parse(qwen2({ ...on, max_window_layers: 0 })).windows).toEqual([16, 16]);
    expect(parse(qwen3({ ...on })).windows).toEqual([0, 0]);
    const kinds = ['sliding_attention', 'full_attention'];
    expect(parse(qwen3({ ...on, layer_types: kinds })).windows).toEqual([16, 0]);
    expect(failure(qwen3({ layer_types: kinds }))).toMatchObject({ code: 'MODEL_CONFIG_INVALID' });
    expect(failure(qwen2({ ...on, layer_types: ['chunked_attention', 'full_attention'] })).code).toBe(
      'MODEL_UNSUPPORTED',
    );
    expect(failure(qwen2({ ...on, layer_types: ['full_attention'] })).message).toContain('2 entries');
  });
});

describe('rope scaling', () => {
  test('llama3 keeps all its fields; the original length falls back to the maximum', () => {
    const rope_scaling = { rope_type: 'llama3', factor: 8, low_freq_factor: 1, high_freq_factor: 4 };
    const expected = { type: 'llama3', factor: 8, lowFrequencyFactor: 1, highFrequencyFactor: 4 };
    const original = { ...rope_scaling, original_max_position_embeddings: 64 };
    expect(scalingOf({ ...llama, rope_scaling: original })?.scaling).toEqual({ ...expected, originalLength: 64 });
    expect(scalingOf({ ...llama, rope_scaling })?.scaling).toEqual({ ...expected, originalLength: 256 });
  });

  test('yarn: defaults, the attention factor from factor or mscale, and a context of factor times the original length', () => {
    const rope_scaling = { rope_type: 'yarn', factor: 4, original_max_position_embeddings: 256 };
    const shape = parse({ ...llama, rope_scaling });
    expect(shape.maxPositions).toBe(1024);
    expect(shape.positions).toMatchObject({
      scaling: {
        type: 'yarn',
        factor: 4,
        betaFast: 32,
        betaSlow: 1,
        originalLength: 256,
        attentionFactor: 0.1 * Math.log(4) + 1,
        truncate: true,
      },
    });
    const more = { beta_fast: 16, beta_slow: 2, truncate: false, attention_factor: 1.5 };
    expect(scalingOf({ ...llama, rope_scaling: { ...rope_scaling, ...more } })?.scaling).toMatchObject({
      betaFast: 16,
      betaSlow: 2,
      truncate: false,
      attentionFactor: 1.5,
    });
    const mscale = { mscale: 0.7, mscale_all_dim: 1.2 };
    const attentionFactor = (0.07 * Math.log(4) + 1) / (0.12 * Math.log(4) + 1);
    expect(scalingOf({ ...llama, rope_scaling: { ...rope_scaling, ...mscale } })?.scaling).toMatchObject({
      attentionFactor,
    });
  });

  test('dynamic is cut to the original length, and the limit says why', () => {
    const shape = parse({ ...llama, rope_scaling: { rope_type: 'dynamic', factor: 2 } });
    expect(shape.maxPositions).toBe(256);
    expect(explainPositionLimit(shape)).toMatch(/"dynamic".*256/);
    const explicit = { rope_type: 'dynamic', factor: 2, original_max_position_embeddings: 64 };
    expect(parse({ ...llama, rope_scaling: explicit }).maxPositions).toBe(64);
    expect(explainPositionLimit(parse(llama))).not.toContain('dynamic');
  });

  test('theta inside the rope fields comes first', () => {
    expect(scalingOf({ ...llama, rope_parameters: { rope_type: 'default', rope_theta: 77 } })?.theta).toBe(77);
    const { rope_theta: _, ...rest } = llama;
    expect(scalingOf(rest)?.theta).toBe(10000);
  });
});

describe('heads', () => {
  const one = { id2label: { 0: 'LABEL_0' } };

  test('the head comes from architectures; a classifier needs one label', () => {
    const score = { ...llama, architectures: ['LlamaForSequenceClassification'], ...one, pad_token_id: 0 };
    expect(parse(score)).toMatchObject({ head: 'score', headBias: false, padToken: 0, tied: false });
    const value = { ...llama, architectures: ['LlamaForTokenClassification'], num_labels: 1 };
    expect(parse(value)).toMatchObject({ head: 'value', headBias: true, padToken: null });
    expect(parse({ ...value, token_classification_bias: false }).headBias).toBe(false);
    expect(parse({ ...llama, architectures: undefined }).head).toBe('language');
    for (const labels of [{}, { num_labels: 3 }, { id2label: { 0: 'a', 1: 'b' } }]) {
      const error = failure({ ...llama, architectures: ['LlamaForSequenceClassification'], ...labels });
      expect(error).toMatchObject({ code: 'MODEL_UNSUPPORTED', message: expect.stringMatching(/labels.*one label/) });
    }
  });

  test('withHead keeps the trunk and changes nothing else', () => {
    const language = parse({ ...llama, tie_word_embeddings: true });
    const value = withHead(language, 'value');
    expect(value).toEqual({ ...language, head: 'value', headBias: true, tied: false });
    expect(withHead(value, 'score')).toEqual({ ...language, head: 'score', headBias: false, tied: false });
    expect(withHead(language, 'language')).toBe(language);
    expect(() => withHead(value, 'language')).toThrow(/language model/);
  });
});

describe('refusals', () => {
  test.each<[string, Json]>([
    ['hidden_act', { ...llama, hidden_act: 'gelu' }],
    ['rope_type', { ...llama, rope_scaling: { rope_type: 'longrope', factor: 4 } }],
    ['type', { ...llama, rope_scaling: { type: 'mrope' } }],
    ['mrope_section', { ...llama, rope_scaling: { rope_type: 'default', mrope_section: [2, 3, 3] } }],
    ['partial_rotary_factor', { ...llama, partial_rotary_factor: 0.5 }],
    ['partial_rotary_factor', { ...llama, rope_parameters: { rope_type: 'default', partial_rotary_factor: 0.5 } }],
    ['attn_logit_softcapping', { ...llama, attn_logit_softcapping: 50 }],
    ['final_logit_softcapping', { ...llama, final_logit_softcapping: 30 }],
    ['quantization_config', { ...llama, quantization_config: { quant_method: 'gptq' } }],
    ['num_local_experts', { ...mistral(), num_local_experts: 8 }],
    ['layer_norm_type', { ...llama, layer_norm_type: 'layer_norm' }],
    ['residual_multiplier', { ...llama, residual_multiplier: 0.2 }],
    ['is_causal', { ...llama, is_causal: false }],
    ['sliding_window', { ...llama, sliding_window: 16 }],
    ['attention_bias', mistral({ attention_bias: true })],
    ['mlp_bias', qwen2({ mlp_bias: true })],
    ['head_dim', { ...llama, head_dim: 15 }],
    ['activation_function', { ...gpt2, activation_function: 'relu' }],
    ['scale_attn_weights', { ...gpt2, scale_attn_weights: false }],
    ['scale_attn_by_inverse_layer_idx', { ...gpt2, scale_attn_by_inverse_layer_idx: true }],
    ['add_cross_attention', { ...gpt2, add_cross_attention: true }],
    ['architectures', { ...llama, architectures: ['LlamaForQuestionAnswering'] }],
    ['model_type', { ...llama, model_type: 'mamba', architectures: ['MambaForCausalLM'] }],
  ])('%s that changes the mathematics is refused by name, value and file', (key, json) => {
    const error = failure(json);
    expect(error.code).toBe('MODEL_UNSUPPORTED');
    expect(error.message).toContain('folder/config.json');
    expect(error.message).toContain(key);
    expect(error.details).toMatchObject({ key });
  });

  test('harmless values of the same fields and unknown keys pass', () => {
    const harmless = {
      partial_rotary_factor: 1,
      attn_logit_softcapping: null,
      quantization_config: null,
      residual_multiplier: 1,
      pruned_heads: {},
      is_causal: true,
      sliding_window: null,
      attention_dropout: 0.1,
      use_cache: false,
      pretraining_tp: 2,
      some_future_note: 'x',
    };
    expect(parse({ ...llama, ...harmless })).toEqual(parse(llama));
    expect(parse({ ...gpt2, resid_pdrop: 0.1, reorder_and_upcast_attn: true, scale_attn_weights: true })).toEqual(
      parse(gpt2),
    );
  });

  test.each<[string, unknown, RegExp]>([
    [
      'a missing size',
      { ...llama, hidden_size: undefined },
      /hidden_size: expected a positive integer, received nothing/,
    ],
    [
      'a wrong type',
      { ...llama, num_hidden_layers: '2' },
      /num_hidden_layers: expected a positive integer, received "2"/,
    ],
    ['a negative number', { ...llama, rms_norm_eps: -1 }, /rms_norm_eps: expected a number above 0, received -1/],
    [
      'heads that do not divide',
      { ...llama, num_key_value_heads: 3 },
      /num_key_value_heads: expected a divisor.*\(4\)/,
    ],
    ['width that does not divide', { ...llama, hidden_size: 66 }, /num_attention_heads: expected a divisor.*\(66\)/],
    ['a list instead of an object', [1], /expected a JSON object, received \[1\]/],
    [
      'bands in the wrong order',
      { ...llama, rope_scaling: { type: 'llama3', factor: 2, low_freq_factor: 4, high_freq_factor: 1 } },
      /high_freq_factor/,
    ],
    [
      'a factor that is missing',
      { ...llama, rope_scaling: { type: 'linear' } },
      /rope_scaling: factor: expected a number/,
    ],
  ])('%s is an error naming the field', (_, json, message) => {
    expect(failure(json)).toMatchObject({ code: 'MODEL_CONFIG_INVALID', message: expect.stringMatching(message) });
  });
});
