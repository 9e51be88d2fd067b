/** Small models of every kind for tests of layouts: eight parts, three layers, sizes that are not round. */
import { parseModelConfig, withHead } from '../../src/layout/config.js';
import type { ModelShape } from '../../src/layout/model-shape.js';

type Json = Record<string, unknown>;

export const rotary = (more: Json = {}): ModelShape =>
  parseModelConfig(
    {
      model_type: 'llama',
      vocab_size: 331,
      hidden_size: 12,
      intermediate_size: 24,
      num_hidden_layers: 3,
      num_attention_heads: 8,
      num_key_value_heads: 2,
      head_dim: 6,
      max_position_embeddings: 64,
      ...more,
    },
    'config.json',
  );

export const gpt2 = (more: Json = {}): ModelShape =>
  parseModelConfig(
    { model_type: 'gpt2', vocab_size: 97, n_embd: 48, n_layer: 3, n_head: 8, n_positions: 16, ...more },
    'config.json',
  );

export const smallShapes: [string, ModelShape][] = [
  ['llama, 2 key/value heads', rotary()],
  ['llama, 8 key/value heads, fewer tokens than parts', rotary({ num_key_value_heads: 8, vocab_size: 10 })],
  ['llama with biases, tied', rotary({ attention_bias: true, mlp_bias: true, tie_word_embeddings: true })],
  ['qwen2, 1 key/value head', rotary({ model_type: 'qwen2', num_key_value_heads: 1 })],
  [
    'qwen3, 4 key/value heads, tied',
    rotary({ model_type: 'qwen3', num_key_value_heads: 4, tie_word_embeddings: true }),
  ],
  ['gpt2, tied', gpt2()],
  ['llama value head', withHead(rotary(), 'value')],
  ['gpt2 score head', withHead(gpt2(), 'score')],
];
