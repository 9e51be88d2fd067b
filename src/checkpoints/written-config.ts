/** config.json of a saved model: the original one, with head, labels, dtype and tying as the engine holds them. */
import { LockstepError } from '../errors.js';
import { parseModelConfig } from '../layout/config.js';
import { architectureName } from '../layout/families.js';
import type { ModelShape } from '../layout/model-shape.js';

/** Fields of the original that describe its own file, its labels or its storage. */
const dropped = [
  '_name_or_path',
  'auto_map',
  'num_labels',
  'id2label',
  'label2id',
  'problem_type',
  'quantization_config',
];

/**
 * @param original the parsed config.json of the same trunk
 * @throws CHECKPOINT_CONFIG_MISMATCH when it is not of the same model, naming the first field that differs
 */
export function writtenConfig(original: Readonly<Record<string, unknown>>, shape: ModelShape): Record<string, unknown> {
  const config: Record<string, unknown> = { ...original, architectures: [architectureName(shape.family, shape.head)] };
  for (const key of dropped) delete config[key];
  if (shape.head === 'language') config.tie_word_embeddings = shape.tied;
  else Object.assign(config, { id2label: { 0: 'LABEL_0' }, label2id: { LABEL_0: 0 } });
  if (shape.head === 'value' && !shape.headBias) config.token_classification_bias = false;
  config['dtype' in original ? 'dtype' : 'torch_dtype'] = 'float32';

  const written = parseModelConfig(config, 'config.json');
  for (const key of Object.keys(written) as (keyof ModelShape)[]) {
    // An engine may be planned for shorter sequences than the model's.
    if (key === 'maxPositions' || JSON.stringify(written[key]) === JSON.stringify(shape[key])) continue;
    const message =
      `The given config.json is of another model: ${key} is ${JSON.stringify(written[key])} there and ` +
      `${JSON.stringify(shape[key])} in the engine. Pass the config.json that the engine was created from.`;
    throw new LockstepError('CHECKPOINT_CONFIG_MISMATCH', message, { field: key });
  }
  return config;
}
