/** The model that the quickstart starts from: a small Llama with random weights, and a tokenizer for the language. */
import { mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { writeJson } from '../../checkpoints/files.js';
import { type NewTensor, writeSafetensors } from '../../checkpoints/safetensors.js';
import { vocabularyText } from './language.js';
import { type Random, randomStream } from './random.js';

const [width, feedForward, layers, heads] = [96, 192, 4, 3];
const positions = 128;
export const endToken = '<|end|>';

/** Writes a Hugging Face directory; returns the number of parameters. */
export async function writeStartingModel(directory: string, seed: number): Promise<number> {
  await mkdir(directory, { recursive: true });
  const tokenizer = byteLevelTokenizer(vocabularyText());
  const vocabulary = Object.keys(tokenizer.model.vocab).length + tokenizer.added_tokens.length;
  const tensors = llamaTensors(vocabulary);
  await writeJson(join(directory, 'tokenizer.json'), tokenizer);
  await writeJson(join(directory, 'tokenizer_config.json'), {
    tokenizer_class: 'PreTrainedTokenizerFast',
    eos_token: endToken,
    model_max_length: positions,
    clean_up_tokenization_spaces: false,
  });
  await writeSafetensors(join(directory, 'model.safetensors'), tensors, async (name) =>
    initialWeights(tensors.find((tensor) => tensor.name === name)!, randomStream(seed, name)),
  );
  await writeJson(join(directory, 'config.json'), llamaConfig(vocabulary));
  return tensors.reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0);
}

function llamaConfig(vocabulary: number): Record<string, unknown> {
  return {
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    vocab_size: vocabulary,
    hidden_size: width,
    intermediate_size: feedForward,
    num_hidden_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: heads,
    max_position_embeddings: positions,
    hidden_act: 'silu',
    rms_norm_eps: 1e-5,
    rope_theta: 10000,
    rope_scaling: null,
    attention_bias: false,
    mlp_bias: false,
    tie_word_embeddings: true,
    bos_token_id: null,
    eos_token_id: vocabulary - 1,
    torch_dtype: 'float32',
  };
}

function llamaTensors(vocabulary: number): NewTensor[] {
  const layer = (index: number): NewTensor[] =>
    Object.entries({
      'input_layernorm.weight': [width],
      'self_attn.q_proj.weight': [width, width],
      'self_attn.k_proj.weight': [width, width],
      'self_attn.v_proj.weight': [width, width],
      'self_attn.o_proj.weight': [width, width],
      'post_attention_layernorm.weight': [width],
      'mlp.gate_proj.weight': [feedForward, width],
      'mlp.up_proj.weight': [feedForward, width],
      'mlp.down_proj.weight': [width, feedForward],
    }).map(([name, shape]) => ({ name: `model.layers.${index}.${name}`, shape }));
  return [
    { name: 'model.embed_tokens.weight', shape: [vocabulary, width] },
    ...Array.from({ length: layers }, (_, index) => layer(index)).flat(),
    { name: 'model.norm.weight', shape: [width] },
  ];
}

/**
 * Norms start at 1. Matrices are uniform with variance 1 / columns; those that write to the residual stream are divided by
 * sqrt(2 · layers), so that its variance does not grow with depth (Radford et al. 2019).
 */
function initialWeights({ name, shape }: NewTensor, random: Random): Float32Array {
  const [rows, columns] = shape as [number, number?];
  if (columns === undefined) return new Float32Array(rows).fill(1);
  const writes = name.endsWith('o_proj.weight') || name.endsWith('down_proj.weight');
  const bound = Math.sqrt(3 / columns / (writes ? 2 * layers : 1));
  return Float32Array.from({ length: rows * columns }, () => (2 * random() - 1) * bound);
}

/**
 * A byte-level BPE tokenizer in the format of tokenizer.json: the 256 bytes, then merges that build each word of `texts`
 * from its beginning. Any other text is encoded too, in smaller pieces.
 */
function byteLevelTokenizer(texts: readonly string[]) {
  const letters = byteLetters();
  const vocab: Record<string, number> = Object.fromEntries(letters.map((letter, id) => [letter, id]));
  const merges: [string, string][] = [];
  for (const word of texts.flatMap((text) => text.match(/ ?\p{L}+/gu) ?? [])) {
    const [first, ...rest] = Array.from(Buffer.from(word), (byte) => letters[byte]!);
    let built = first!;
    for (const letter of rest) {
      if (!Object.hasOwn(vocab, built + letter)) {
        vocab[built + letter] = Object.keys(vocab).length;
        merges.push([built, letter]);
      }
      built += letter;
    }
  }
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: [
      {
        id: Object.keys(vocab).length,
        content: endToken,
        ...{ single_word: false, lstrip: false, rstrip: false, normalized: false, special: true },
      },
    ],
    normalizer: null,
    pre_tokenizer: byteLevel,
    post_processor: null,
    decoder: byteLevel,
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab,
      merges,
    },
  };
}

/** The letter that stands for each byte in byte-level vocabularies: itself when printable, else the next from U+0100. */
function byteLetters(): string[] {
  const printable = (byte: number) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte !== 173);
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : next++));
}
