/** Names of tensors in Hugging Face checkpoints, by family. */
import type { ModelShape } from './model-shape.js';

/** Names inside a layer, without `.weight` and `.bias`. */
export interface LayerNames {
  norm1: string;
  /** q, k, v: one tensor each, or one that stacks them. */
  qkv: readonly string[];
  queryNorm: string;
  keyNorm: string;
  attentionOut: string;
  norm2: string;
  /** gate, up; or the one matrix of a plain MLP. */
  up: readonly string[];
  down: string;
}

export interface CheckpointNames {
  /** What all names of the trunk begin with; checkpoints saved from the bare trunk lack it. */
  prefix: string;
  embed: string;
  positions: string;
  finalNorm: string;
  vocabulary: string;
  head: string;
  layer(index: number): LayerNames;
}

const rotary: CheckpointNames = {
  prefix: 'model.',
  embed: 'model.embed_tokens',
  positions: '',
  finalNorm: 'model.norm',
  vocabulary: 'lm_head',
  head: 'score',
  layer: (index) => {
    const at = `model.layers.${index}.`;
    return {
      norm1: `${at}input_layernorm`,
      qkv: [`${at}self_attn.q_proj`, `${at}self_attn.k_proj`, `${at}self_attn.v_proj`],
      queryNorm: `${at}self_attn.q_norm`,
      keyNorm: `${at}self_attn.k_norm`,
      attentionOut: `${at}self_attn.o_proj`,
      norm2: `${at}post_attention_layernorm`,
      up: [`${at}mlp.gate_proj`, `${at}mlp.up_proj`],
      down: `${at}mlp.down_proj`,
    };
  },
};

const gpt2: CheckpointNames = {
  prefix: 'transformer.',
  embed: 'transformer.wte',
  positions: 'transformer.wpe',
  finalNorm: 'transformer.ln_f',
  vocabulary: 'lm_head',
  head: 'score',
  layer: (index) => {
    const at = `transformer.h.${index}.`;
    return {
      norm1: `${at}ln_1`,
      qkv: [`${at}attn.c_attn`],
      queryNorm: '',
      keyNorm: '',
      attentionOut: `${at}attn.c_proj`,
      norm2: `${at}ln_2`,
      up: [`${at}mlp.c_fc`],
      down: `${at}mlp.c_proj`,
    };
  },
};

export function checkpointNames(shape: Pick<ModelShape, 'family' | 'head'>): CheckpointNames {
  if (shape.family !== 'gpt2') return rotary;
  return shape.head === 'value' ? { ...gpt2, head: 'classifier' } : gpt2;
}

/** The name of a tensor in the class with a head: checkpoints of the bare trunk lack the prefix. */
export function canonicalName(names: CheckpointNames, name: string): string {
  const complete = [names.prefix, `${names.vocabulary}.`, `${names.head}.`].some((start) => name.startsWith(start));
  return complete ? name : names.prefix + name;
}
