/** Model families and heads as Hugging Face names them. */
import { LockstepError } from '../errors.js';
import type { ConfigFields } from './config-fields.js';
import { shown } from './config-fields.js';
import type { Head, ModelShape } from './model-shape.js';

export type Family = ModelShape['family'];

const classNames: Readonly<Record<Family, string>> = {
  llama: 'Llama',
  mistral: 'Mistral',
  qwen2: 'Qwen2',
  qwen3: 'Qwen3',
  gpt2: 'GPT2',
};

const families = Object.keys(classNames) as Family[];

const classifiers: Readonly<Record<Exclude<Head, 'language'>, string>> = {
  score: 'ForSequenceClassification',
  value: 'ForTokenClassification',
};

/** The class that loads such a checkpoint, as in `architectures` of config.json. */
export function architectureName(family: Family, head: Head): string {
  const suffix = head === 'language' ? (family === 'gpt2' ? 'LMHeadModel' : 'ForCausalLM') : classifiers[head];
  return classNames[family] + suffix;
}

/**
 * Family and head of a config.json, from `model_type` and the first of `architectures` (a language model when there is none).
 * @throws MODEL_UNSUPPORTED for another family, another head, or a classifier with more than one label.
 */
export function parseArchitecture(fields: ConfigFields): { family: Family; head: Head } {
  const modelType = fields.get('model_type');
  const architecture = fields.strings('architectures')?.[0];
  const family = families.find((name) => name === modelType);
  if (family === undefined) {
    const message =
      `${fields.where}: model_type ${shown(modelType ?? null)}${architecture ? ` (${architecture})` : ''} is not supported. ` +
      `Supported: ${families.join(', ')}.`;
    throw new LockstepError('MODEL_UNSUPPORTED', message, { file: fields.where, key: 'model_type', value: modelType });
  }
  if (architecture === undefined) return { family, head: 'language' };
  const heads: readonly Head[] = ['language', 'score', 'value'];
  const head = heads.find((candidate) => architectureName(family, candidate) === architecture);
  if (head === undefined) {
    throw fields.unsupported('architectures', heads.map((name) => architectureName(family, name)).join(', '));
  }
  if (head !== 'language') requireOneLabel(fields, architecture);
  return { family, head };
}

function requireOneLabel(fields: ConfigFields, architecture: string): void {
  const names = fields.object('id2label');
  const labels = names ? Object.keys(names.json).length : fields.integer('num_labels', 2);
  if (labels === 1) return;
  const message =
    `${fields.where}: ${architecture} has ${labels} labels (${names ? 'id2label' : 'num_labels, by default 2'}); ` +
    'only a head with one label is supported. Use a checkpoint whose id2label has one entry.';
  const key = names ? 'id2label' : 'num_labels';
  throw new LockstepError('MODEL_UNSUPPORTED', message, { file: fields.where, key, value: labels });
}
