/** config.json of a Hugging Face checkpoint -> ModelShape. Whatever changes the mathematics is read or refused. */
import { LockstepError } from '../errors.js';
import { ConfigFields } from './config-fields.js';
import { refuseUnsupportedFields } from './config-refusals.js';
import { parseRope } from './config-rope.js';
import { type Family, parseArchitecture } from './families.js';
import type { Head, ModelShape } from './model-shape.js';

/** What transformers assumes where config.json is silent. */
const defaults = {
  llama: { maxPositions: 2048, normEpsilon: 1e-6, tied: false },
  mistral: { maxPositions: 131072, normEpsilon: 1e-6, tied: false },
  qwen2: { maxPositions: 32768, normEpsilon: 1e-6, tied: false },
  qwen3: { maxPositions: 32768, normEpsilon: 1e-6, tied: false },
  gpt2: { maxPositions: 1024, normEpsilon: 1e-5, tied: true },
} as const;

type RotaryFamily = Exclude<Family, 'gpt2'>;

/** Key/value heads where config.json has no such key; null there always means as many as query heads. */
const defaultKeyValueHeads: Partial<Record<RotaryFamily, number>> = { mistral: 8, qwen2: 32, qwen3: 32 };
const defaultHeadWidth: Partial<Record<RotaryFamily, number>> = { qwen3: 128 };
const defaultWindow = 4096;

/**
 * @param json the parsed config.json
 * @param where its path, for errors
 * @throws MODEL_CONFIG_INVALID for a missing or malformed field, MODEL_UNSUPPORTED for one that asks for mathematics that the
 * engine does not have; both name the field, its value and the file.
 */
export function parseModelConfig(json: unknown, where: string): ModelShape {
  const fields = ConfigFields.of(json, where);
  const { family, head } = parseArchitecture(fields);
  refuseUnsupportedFields(fields, family === 'gpt2' ? 'layer' : 'rms');
  return family === 'gpt2' ? parseGpt2(fields, head) : parseRotary(fields, family, head);
}

function parseRotary(fields: ConfigFields, family: RotaryFamily, head: Head): ModelShape {
  const width = fields.integer('hidden_size');
  const heads = fields.integer('num_attention_heads');
  const layers = fields.integer('num_hidden_layers');
  const keyValueHeads = parseKeyValueHeads(fields, family, heads);
  const headWidth = parseHeadWidth(fields, family, width, heads);
  const maxLength = fields.integer('max_position_embeddings', defaults[family].maxPositions);
  const rope = parseRope(fields, maxLength);
  for (const key of ['hidden_act', 'hidden_activation']) {
    if (!['silu', 'swish'].includes(fields.string(key, 'silu'))) throw fields.unsupported(key, '"silu"');
  }
  return {
    family,
    vocabulary: fields.integer('vocab_size'),
    width,
    layers,
    heads,
    keyValueHeads,
    headWidth,
    feedForward: fields.integer('intermediate_size'),
    norm: 'rms',
    normEpsilon: fields.positive('rms_norm_eps', defaults[family].normEpsilon),
    activation: 'swiglu',
    ...parseBiases(fields, family),
    headNorm: family === 'qwen3',
    positions: { type: 'rope', ...rope },
    maxPositions: positionLimit(rope.scaling, maxLength),
    windows: parseWindows(fields, family, layers),
    ...parseHeadFields(fields, family, head),
  };
}

function parseGpt2(fields: ConfigFields, head: Head): ModelShape {
  const width = fields.integer(['n_embd', 'hidden_size']);
  const heads = fields.integer(['n_head', 'num_attention_heads']);
  const layers = fields.integer(['n_layer', 'num_hidden_layers']);
  if (width % heads !== 0) throw fields.invalid('n_head', `a divisor of n_embd (${width})`);
  const activation = fields.string('activation_function', 'gelu_new');
  if (!['gelu_new', 'gelu_pytorch_tanh', 'gelu_fast'].includes(activation)) {
    throw fields.unsupported('activation_function', '"gelu_new", "gelu_pytorch_tanh", "gelu_fast"');
  }
  return {
    family: 'gpt2',
    vocabulary: fields.integer('vocab_size'),
    width,
    layers,
    heads,
    keyValueHeads: heads,
    headWidth: width / heads,
    feedForward: fields.integer('n_inner', 4 * width),
    norm: 'layer',
    normEpsilon: fields.positive('layer_norm_epsilon', defaults.gpt2.normEpsilon),
    activation: 'gelu-tanh',
    qkvBias: true,
    outputBias: true,
    mlpBias: true,
    headNorm: false,
    positions: { type: 'learned' },
    maxPositions: fields.integer(['n_positions', 'max_position_embeddings'], defaults.gpt2.maxPositions),
    windows: new Array<number>(layers).fill(0),
    ...parseHeadFields(fields, 'gpt2', head),
  };
}

function parseKeyValueHeads(fields: ConfigFields, family: RotaryFamily, heads: number): number {
  const whenAbsent = fields.has('num_key_value_heads') ? heads : (defaultKeyValueHeads[family] ?? heads);
  const count = fields.integer('num_key_value_heads', whenAbsent);
  if (heads % count !== 0) throw fields.invalid('num_key_value_heads', `a divisor of num_attention_heads (${heads})`);
  return count;
}

function parseHeadWidth(fields: ConfigFields, family: RotaryFamily, width: number, heads: number): number {
  const fixed = fields.has('head_dim') ? undefined : defaultHeadWidth[family];
  if (fields.get('head_dim') === undefined && fixed === undefined && width % heads !== 0) {
    throw fields.invalid('num_attention_heads', `a divisor of hidden_size (${width}) where head_dim is absent`);
  }
  const headWidth = fields.integer('head_dim', fixed ?? width / heads);
  if (headWidth % 2 !== 0) {
    throw fields.unsupported(
      fields.get('head_dim') === undefined ? 'num_attention_heads' : 'head_dim',
      'an even head width',
    );
  }
  return headWidth;
}

function parseBiases(
  fields: ConfigFields,
  family: RotaryFamily,
): Pick<ModelShape, 'qkvBias' | 'outputBias' | 'mlpBias'> {
  const attention = fields.boolean('attention_bias', false);
  const mlpBias = fields.boolean('mlp_bias', false);
  if (mlpBias && family !== 'llama') throw fields.unsupported('mlp_bias', 'false');
  // Qwen2 has biases on q, k and v, none on the output, whatever the field says; Mistral has none at all.
  if (family === 'qwen2') return { qkvBias: true, outputBias: false, mlpBias };
  if (attention && family === 'mistral') throw fields.unsupported('attention_bias', 'false');
  return { qkvBias: attention, outputBias: attention, mlpBias };
}

/** Mistral: one window for all layers. Qwen: only with `use_sliding_window`, by `layer_types` or from `max_window_layers` on. */
function parseWindows(fields: ConfigFields, family: RotaryFamily, layers: number): number[] {
  const kinds = fields.strings('layer_types');
  const badKind = kinds?.find((kind) => kind !== 'full_attention' && kind !== 'sliding_attention');
  if (badKind !== undefined) throw fields.unsupported('layer_types', 'full_attention, sliding_attention');
  if (kinds && kinds.length !== layers) throw fields.invalid('layer_types', `${layers} entries, one per layer`);

  const window = layerWindow(fields, family);
  if (family === 'llama' && window > 0) throw fields.unsupported('sliding_window', 'null in a Llama model');
  if (family === 'mistral' || family === 'llama') {
    const kind = window > 0 ? 'sliding_attention' : 'full_attention';
    if (kinds?.some((other) => other !== kind)) throw fields.unsupported('layer_types', `${kind} in every layer`);
    return new Array<number>(layers).fill(window);
  }
  if (kinds?.includes('sliding_attention') && window === 0) {
    throw fields.invalid('layer_types', 'full_attention only, as use_sliding_window is off or sliding_window is null');
  }
  const first = fields.get('max_window_layers') === 0 ? 0 : fields.integer('max_window_layers', 28);
  const slides = (layer: number) => (kinds ? kinds[layer] === 'sliding_attention' : layer >= first);
  return Array.from({ length: layers }, (_, layer) => (slides(layer) ? window : 0));
}

function layerWindow(fields: ConfigFields, family: RotaryFamily): number {
  const on = fields.boolean('use_sliding_window', family === 'mistral' || family === 'llama');
  if (!on) return 0;
  const isOff = fields.get('sliding_window') === undefined && (fields.has('sliding_window') || family === 'llama');
  return isOff ? 0 : fields.integer('sliding_window', defaultWindow);
}

function parseHeadFields(
  fields: ConfigFields,
  family: Family,
  head: Head,
): Pick<ModelShape, 'head' | 'headBias' | 'tied' | 'padToken'> {
  const tied = fields.boolean('tie_word_embeddings', defaults[family].tied);
  const pad = fields.get('pad_token_id');
  if (pad !== undefined && !Number.isSafeInteger(pad)) throw fields.invalid('pad_token_id', 'a token id or null');
  return {
    head,
    headBias: head === 'value' && (family === 'gpt2' || fields.boolean('token_classification_bias', true)),
    tied: head === 'language' && tied,
    padToken: (pad as number | undefined) ?? null,
  };
}

/** YaRN extends the context by its factor; dynamic NTK is exact up to the original length only. */
function positionLimit(scaling: ReturnType<typeof parseRope>['scaling'], maxLength: number): number {
  if (scaling.type === 'dynamic') return scaling.originalLength;
  if (scaling.type === 'yarn') return Math.max(maxLength, Math.floor(scaling.originalLength * scaling.factor));
  return maxLength;
}

/** Why a sequence may not be longer than `maxPositions`, as the end of an error message. */
export function explainPositionLimit(shape: ModelShape): string {
  if (shape.positions.type === 'rope' && shape.positions.scaling.type === 'dynamic') {
    return (
      `the model's rope type "dynamic" is supported up to its original length of ${shape.maxPositions} positions only ` +
      '(beyond it every frequency depends on the length of the sequence, so no cached key would stay valid)'
    );
  }
  return `the model has ${shape.maxPositions} positions`;
}

/**
 * The same trunk under another head: a critic or a reward model from a language model.
 * @throws MODEL_HEAD for a language model from a classifier, whose vocabulary projection is not known.
 */
export function withHead(shape: ModelShape, head: Head): ModelShape {
  if (shape.head === head) return shape;
  if (head === 'language') {
    const message = `A model with a ${shape.head} head has no vocabulary projection; start from a language model.`;
    throw new LockstepError('MODEL_HEAD', message, { expected: 'language', received: shape.head });
  }
  return { ...shape, head, headBias: head === 'value', tied: false };
}
