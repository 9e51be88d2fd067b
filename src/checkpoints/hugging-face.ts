/** Hugging Face checkpoint folders: opening, planning a load into the engine, saving what the engine holds. */
import { join, resolve } from 'node:path';
import { awaitedLater } from '../engine/device.js';
import type { Engine, FileTensor, Saving } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import { canonicalName, checkpointNames } from '../layout/checkpoint-names.js';
import { parseModelConfig } from '../layout/config.js';
import type { ModelShape } from '../layout/model-shape.js';
import { type TensorSource, type TensorSpec, tensorTable } from '../layout/tensor-table.js';
import {
  isSystemError,
  makeDirectory,
  readIfPresent,
  readTextIfPresent,
  removeFile,
  sync,
  writeAtomically,
  writeJson,
} from './files.js';
import { resolveModelDirectory } from './hub-cache.js';
import {
  float32Size,
  type NewTensor,
  openForReading,
  readBytes,
  readSafetensorsHeader,
  type StoredTensor,
} from './safetensors.js';
import { type SaveTiming, saveTensors } from './saving.js';
import { writtenConfig } from './written-config.js';

const configFile = 'config.json';
const singleFile = 'model.safetensors';
const indexFile = 'model.safetensors.index.json';

export interface Checkpoint {
  directory: string;
  /** config.json as it stands. */
  config: Readonly<Record<string, unknown>>;
  shape: ModelShape;
  /** By the name that transformers gives the tensor in its class with a head (a missing `model.` or `transformer.` is added). */
  tensors: ReadonlyMap<string, StoredTensor>;
}

/**
 * Opens a checkpoint: reads config.json and the headers of all files, no weights.
 * @param model a folder, or a hub name found in the local cache
 * @throws MODEL_NOT_FOUND, CHECKPOINT_FILE_MISSING, CHECKPOINT_CORRUPT, MODEL_CONFIG_INVALID, MODEL_UNSUPPORTED
 */
export async function openCheckpoint(model: string): Promise<Checkpoint> {
  const directory = resolve(await resolveModelDirectory(model));
  const path = join(directory, configFile);
  const config = await readJsonObject(path, 'MODEL_CONFIG_INVALID');
  const shape = parseModelConfig(config, path);
  const tensors = canonicalNames(await readHeaders(directory), shape);
  return { directory, config, shape: await withActualTie(shape, tensors), tensors };
}

async function readJsonObject(path: string, code: 'MODEL_CONFIG_INVALID' | 'CHECKPOINT_CORRUPT') {
  const text = await readTextIfPresent(path);
  if (text === undefined) {
    const message = `${path}: no such file. Expected a Hugging Face checkpoint folder with config.json and *.safetensors.`;
    throw new LockstepError('CHECKPOINT_FILE_MISSING', message, { file: path });
  }
  try {
    const json: unknown = JSON.parse(text);
    if (typeof json === 'object' && json !== null && !Array.isArray(json)) return json as Record<string, unknown>;
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new LockstepError(code, `${path}: not JSON (${reason}). Copy or download the file again.`, { file: path });
  }
  throw new LockstepError(code, `${path}: expected a JSON object. Copy or download the file again.`, { file: path });
}

/** model.safetensors, or the files of its index; transformers looks in the same order. */
async function readHeaders(directory: string): Promise<Map<string, StoredTensor>> {
  const indexPath = join(directory, indexFile);
  try {
    return await readSafetensorsHeader(join(directory, singleFile));
  } catch (error) {
    if (!LockstepError.isInstance(error) || error.code !== 'CHECKPOINT_FILE_MISSING') throw error;
  }
  if ((await readTextIfPresent(indexPath)) === undefined) {
    const message =
      `${directory}: no weights: neither ${singleFile} nor ${indexFile} is there. ` +
      'Copy or download the checkpoint again; weights in other formats (*.bin, *.gguf) must be converted to safetensors first.';
    throw new LockstepError('CHECKPOINT_FILE_MISSING', message, { file: join(directory, singleFile) });
  }
  return readShards(directory, indexPath);
}

async function readShards(directory: string, indexPath: string): Promise<Map<string, StoredTensor>> {
  const { weight_map: map } = await readJsonObject(indexPath, 'CHECKPOINT_CORRUPT');
  const isMap = typeof map === 'object' && map !== null && Object.values(map).every((file) => typeof file === 'string');
  if (!isMap) {
    const message = `${indexPath}: weight_map is not an object from tensor names to files. Copy or download the file again.`;
    throw new LockstepError('CHECKPOINT_CORRUPT', message, { file: indexPath });
  }
  const headers = new Map<string, Map<string, StoredTensor>>();
  const tensors = new Map<string, StoredTensor>();
  for (const [name, file] of Object.entries(map as Record<string, string>)) {
    const header = headers.get(file) ?? (await readSafetensorsHeader(shardPath(directory, file, indexPath)));
    headers.set(file, header);
    const tensor = header.get(name);
    if (!tensor) {
      const message = `${join(directory, file)}: tensor "${name}" is not in it, though ${indexFile} says so. Copy or download both again.`;
      throw new LockstepError('CHECKPOINT_TENSOR_MISSING', message, { file: join(directory, file), tensor: name });
    }
    tensors.set(name, tensor);
  }
  return tensors;
}

function shardPath(directory: string, file: string, indexPath: string): string {
  if (/^[^/\\]+$/.test(file) && file !== '..') return join(directory, file);
  const message = `${indexPath}: weight_map names "${file}", which is not a file of its own folder. Correct the index.`;
  throw new LockstepError('CHECKPOINT_CORRUPT', message, { file: indexPath, received: file });
}

/** Names with the prefix that checkpoints of the bare trunk lack. */
function canonicalNames(tensors: Map<string, StoredTensor>, shape: ModelShape): Map<string, StoredTensor> {
  const names = checkpointNames(shape);
  if (tensors.has(`${names.embed}.weight`)) return tensors;
  return new Map([...tensors].map(([name, tensor]) => [canonicalName(names, name), tensor]));
}

/** As transformers 5 does: a tied projection that is stored and differs from the embedding is not tied after all. */
async function withActualTie(shape: ModelShape, tensors: ReadonlyMap<string, StoredTensor>): Promise<ModelShape> {
  const names = checkpointNames(shape);
  const projection = tensors.get(`${names.vocabulary}.weight`);
  const embed = tensors.get(`${names.embed}.weight`);
  if (!shape.tied || !projection || !embed) return shape;
  return (await sameBytes(projection, embed)) ? shape : { ...shape, tied: false };
}

async function sameBytes(a: StoredTensor, b: StoredTensor): Promise<boolean> {
  if (a.dtype !== b.dtype || a.bytes !== b.bytes) return false;
  const first = await openForReading(a.file);
  const second = await openForReading(b.file);
  try {
    const chunk = 1 << 22;
    for (let at = 0; at < a.bytes; at += chunk) {
      const bytes = Math.min(chunk, a.bytes - at);
      const [left, right] = await Promise.all([
        readBytes(first, a.file, a.offset + at, bytes),
        readBytes(second, b.file, b.offset + at, bytes),
      ]);
      if (!left.equals(right)) return false;
    }
    return true;
  } finally {
    await Promise.all([first.close(), second.close()]);
  }
}

export interface LoadPlan {
  /** What to read from where. */
  tensors: FileTensor[];
  /** Tensors of the engine that the checkpoint lacks and that start at zero: a new head. */
  zeroed: string[];
}

export interface LoadOptions {
  /** A value or score head that the checkpoint lacks starts at zero; otherwise it is an error. */
  newHead?: boolean;
}

type Model = Pick<Engine, 'shape' | 'parts'>;

/**
 * Finds every tensor of a model of the checkpoint's shape, or of that shape under another head, and checks it.
 * @throws CHECKPOINT_TENSOR_MISSING, CHECKPOINT_TENSOR_SHAPE, CHECKPOINT_DTYPE, each naming file and tensor
 */
export function loadPlan(checkpoint: Checkpoint, model: Model, options: LoadOptions = {}): LoadPlan {
  const plan: LoadPlan = { tensors: [], zeroed: [] };
  for (const spec of tensorTable(model.shape, model.parts)) {
    for (const source of spec.sources) {
      const stored = findStored(checkpoint, source);
      if (stored) plan.tensors.push(weightsIn(source, stored));
      else if (options.newHead && spec.name.startsWith('scalarHead')) plan.zeroed.push(spec.name);
      else throw missingTensor(checkpoint, spec, source);
    }
  }
  return plan;
}

/** GPT-2 calls the same projection `score` or `classifier`: a critic may start from a reward model. */
function findStored(checkpoint: Checkpoint, source: TensorSource): StoredTensor | undefined {
  return checkpoint.tensors.get(source.name) ?? checkpoint.tensors.get(source.name.replace(/^classifier\./, 'score.'));
}

function missingTensor(checkpoint: Checkpoint, spec: TensorSpec, source: TensorSource): LockstepError {
  const hint = spec.name.startsWith('scalarHead')
    ? 'The model has no such head yet: train a reward model first, or ask for a new head.'
    : 'The checkpoint is incomplete or of another model: copy or download it again.';
  const message = `${checkpoint.directory}: tensor "${source.name}" [${source.shape.join(', ')}] is missing. ${hint}`;
  return new LockstepError('CHECKPOINT_TENSOR_MISSING', message, {
    directory: checkpoint.directory,
    tensor: source.name,
    expected: source.shape,
  });
}

function weightsIn({ name, shape }: TensorSource, { file, dtype, shape: received, offset }: StoredTensor): FileTensor {
  if (received.length !== shape.length || received.some((extent, i) => extent !== shape[i])) {
    const message =
      `${file}: tensor "${name}" has shape [${received.join(', ')}]; config.json asks for [${shape.join(', ')}]. ` +
      'Use the config.json that belongs to these weights.';
    throw new LockstepError('CHECKPOINT_TENSOR_SHAPE', message, { file, tensor: name, expected: shape, received });
  }
  if (dtype !== 'F32' && dtype !== 'BF16' && dtype !== 'F16') {
    const message = `${file}: tensor "${name}" is ${dtype}; F32, BF16 and F16 are supported. Convert the checkpoint.`;
    throw new LockstepError('CHECKPOINT_DTYPE', message, { file, tensor: name, received: dtype });
  }
  return { name, space: 'weights', file, offset, dtype };
}

/** Checkpoint tensors of a model, in table order. */
export function checkpointTensors(model: Model): NewTensor[] {
  return tensorTable(model.shape, model.parts).flatMap((spec) =>
    spec.sources.map(({ name, shape }) => ({ name, shape })),
  );
}

const tokenizerFiles = [
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.json',
  'vocab.txt',
  'merges.txt',
  'tokenizer.model',
  'chat_template.jinja',
  'chat_template.json',
];
const generationFile = 'generation_config.json';
const defaultShardBytes = 5_000_000_000;

/** Tokenizer files and generation settings, by name. */
export type Companions = ReadonlyMap<string, Uint8Array>;

/** Those that a folder has. @throws CHECKPOINT_UNREADABLE */
export async function readCompanions(directory: string): Promise<Companions> {
  const companions = new Map<string, Uint8Array>();
  for (const name of [...tokenizerFiles, generationFile]) {
    const path = join(directory, name);
    const content = await readIfPresent(path).catch((error: unknown) => {
      if (!isSystemError(error)) throw error;
      const message = `Cannot read ${path}: ${error.code}. Make it readable, or remove it if the model has no use for it.`;
      throw new LockstepError('CHECKPOINT_UNREADABLE', message, { path, cause: error.code }, { cause: error });
    });
    if (content !== undefined) companions.set(name, content);
  }
  return companions;
}

export interface SaveOptions extends SaveTiming {
  /** config.json of the checkpoint that the model came from; architecture, labels, dtype and tying are adapted. */
  configJson: Readonly<Record<string, unknown>>;
  /** Files of the checkpoint that the model came from to write beside the weights. */
  companions?: Companions;
  /** Weights beyond it are cut into several files with an index. Default 5 GB. */
  maxShardBytes?: number;
}

/**
 * Writes the engine's weights as a Hugging Face folder in float32 that transformers loads unchanged. Every file appears
 * complete or not at all; config.json comes last, so a folder that has one is complete.
 * @throws CHECKPOINT_WRITE_FAILED with path and cause
 */
export async function saveModel(engine: Engine, directory: string, options: SaveOptions): Promise<void> {
  await (await beginSavingModel(engine, directory, options)).written;
}

/** The same, of the engine's present state; with `copy` it goes on when this has resolved. */
export async function beginSavingModel(engine: Engine, directory: string, options: SaveOptions): Promise<Saving> {
  const config = writtenConfig(options.configJson, engine.shape);
  await makeDirectory(directory);
  const shards = shardsOf(checkpointTensors(engine), options.maxShardBytes ?? defaultShardBytes);
  const names = shards.map((_, i) => shardName(i, shards.length));
  const files = shards.map((tensors, i) => ({ path: join(directory, names[i] as string), tensors: weights(tensors) }));
  const { copiedBytes, written } = await saveTensors(engine, files, options);
  const finish = async () => {
    await written;
    await writeIndex(directory, shards, names);
    for (const [name, content] of options.companions ?? []) {
      const generates = engine.shape.head === 'language';
      if (generates || name !== generationFile) await writeAtomically(join(directory, name), [content]);
    }
    await writeJson(join(directory, configFile), config);
    await sync(directory);
  };
  return { copiedBytes, written: awaitedLater(finish()) };
}

const weights = (tensors: readonly NewTensor[]) =>
  tensors.map((tensor) => ({ ...tensor, parameter: tensor.name, space: 'weights' as const }));

function shardName(index: number, count: number): string {
  const number = (i: number) => String(i).padStart(5, '0');
  return count === 1 ? singleFile : `model-${number(index + 1)}-of-${number(count)}.safetensors`;
}

/** The index of several files; what an earlier save with another number of files left is removed. */
async function writeIndex(directory: string, shards: readonly NewTensor[][], names: readonly string[]): Promise<void> {
  if (shards.length === 1) return removeFile(join(directory, indexFile));
  const map = Object.fromEntries(shards.flatMap((shard, i) => shard.map(({ name }) => [name, names[i]])));
  const totalSize = shards.flat().reduce((sum, { shape }) => sum + float32Size(shape), 0);
  await writeJson(join(directory, indexFile), { metadata: { total_size: totalSize }, weight_map: map });
  await removeFile(join(directory, singleFile));
}

/** Tensors in order, a new shard where the next one would not fit. */
function shardsOf(tensors: readonly NewTensor[], maxShardBytes: number): NewTensor[][] {
  const shards: NewTensor[][] = [[]];
  let bytes = 0;
  for (const tensor of tensors) {
    const size = float32Size(tensor.shape);
    if (bytes > 0 && bytes + size > maxShardBytes) {
      shards.push([]);
      bytes = 0;
    }
    (shards.at(-1) as NewTensor[]).push(tensor);
    bytes += size;
  }
  return shards;
}
