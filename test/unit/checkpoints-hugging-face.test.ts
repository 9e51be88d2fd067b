import {
  copyFileSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { writeFailure } from '../../src/checkpoints/files.js';
import { hubCacheDirectory, resolveModelDirectory } from '../../src/checkpoints/hub-cache.js';
import { loadPlan, openCheckpoint, readCompanions, saveModel } from '../../src/checkpoints/hugging-face.js';
import { loadOptimizerState, saveOptimizerState } from '../../src/checkpoints/state.js';
import { slicesToLoad } from '../../src/engine/file-slices.js';
import type { NativeSlice } from '../../src/engine/native.js';
import { parseModelConfig, withHead } from '../../src/layout/config.js';
import { tensorTable } from '../../src/layout/tensor-table.js';
import { type Json, MemoryEngine, temporaryDirectory, tensorsOf, writeTensors } from './checkpoints-files.js';
import { readFloat32 } from './fake-files.js';

const llama: Json = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  vocab_size: 11,
  hidden_size: 8,
  intermediate_size: 6,
  num_hidden_layers: 1,
  num_attention_heads: 2,
  num_key_value_heads: 1,
  max_position_embeddings: 32,
  tie_word_embeddings: false,
  torch_dtype: 'bfloat16',
};
const gpt2: Json = { model_type: 'gpt2', vocab_size: 11, n_embd: 8, n_layer: 1, n_head: 2, n_positions: 16 };

const value = (name: string, index: number) => name.length + index / 64;

interface Written {
  directory: string;
  weights: string;
}

/** A checkpoint folder of the given config; `change` may edit the list of tensors. */
function checkpoint(
  config: Json,
  change: (tensors: { name: string; shape: readonly number[] }[]) => unknown = () => {},
): Written {
  const directory = temporaryDirectory();
  const tensors = tensorsOf(parseModelConfig(config, 'config.json')).map(({ name, shape }) => ({ name, shape }));
  change(tensors);
  writeFileSync(join(directory, 'config.json'), JSON.stringify(config));
  writeTensors(join(directory, 'model.safetensors'), tensors, value);
  return { directory, weights: join(directory, 'model.safetensors') };
}

const failure = (work: Promise<unknown>) =>
  work.then(
    () => 'no error',
    (error: unknown) => error,
  );
const plan = async ({ directory }: Written, options = {}) => {
  const opened = await openCheckpoint(directory);
  return loadPlan(opened, { shape: opened.shape, parts: 1 }, options);
};

describe('opening', () => {
  test('gives the shape and all tensors; the plan reads every tensor once', async () => {
    const written = checkpoint(llama);
    const opened = await openCheckpoint(written.directory);
    expect(opened.shape).toEqual(parseModelConfig(llama, 'config.json'));
    const { tensors, zeroed } = loadPlan(opened, { shape: opened.shape, parts: 1 });
    expect(zeroed).toEqual([]);
    const table = tensorTable(opened.shape, 1);
    const slices = slicesToLoad(table, tensors);
    expect(slices.map((slice) => slice.name).sort()).toEqual([...opened.tensors.keys()].sort());
    const key = slices.find((slice) => slice.name.endsWith('k_proj.weight'));
    expect(key).toMatchObject({ dtype: 'F32', rows: 4, columns: 8, transposed: false });
    expect(key?.pieces).toEqual([0, table.findIndex(({ name }) => name === 'layers.0.qkv'), 8, 4]);
    expect(key?.file).toBe(written.weights);
  });

  test('GPT-2 loads with or without the prefix, masks aside; its matrices are transposed', async () => {
    const bare = checkpoint(gpt2, (tensors) => {
      for (const tensor of tensors) tensor.name = tensor.name.replace('transformer.', '');
      tensors.push({ name: 'h.0.attn.bias', shape: [1, 1, 16, 16] }, { name: 'h.0.attn.masked_bias', shape: [] });
    });
    const full = checkpoint(gpt2);
    const table = tensorTable((await openCheckpoint(full.directory)).shape, 1);
    const [bareSlices, fullSlices] = [await plan(bare), await plan(full)].map(({ tensors }) =>
      slicesToLoad(table, tensors),
    ) as [NativeSlice[], NativeSlice[]];
    const strip = (slices: typeof fullSlices) => slices.map(({ file: _, offset: __, ...rest }) => rest);
    expect(strip(bareSlices)).toEqual(strip(fullSlices));
    expect(fullSlices.find((slice) => slice.name.endsWith('c_attn.weight'))).toMatchObject({
      rows: 24,
      columns: 8,
      transposed: true,
    });
  });

  test('a tied projection that is stored is ignored when equal, and used when it differs', async () => {
    const tied = { ...llama, tie_word_embeddings: true };
    const withProjection = checkpoint(tied, (tensors) => tensors.push({ name: 'lm_head.weight', shape: [11, 8] }));
    expect((await openCheckpoint(withProjection.directory)).shape.tied).toBe(false);
    writeTensors(
      withProjection.weights,
      [...tensorsOf(parseModelConfig(tied, '')), { name: 'lm_head.weight', shape: [11, 8] }],
      (_, i) => i,
    );
    expect((await openCheckpoint(withProjection.directory)).shape.tied).toBe(true);
  });

  test('shards are found through the index; a missing shard and a wrong entry are named', async () => {
    const { directory } = checkpoint(llama);
    const shape = parseModelConfig(llama, 'config.json');
    const engine = new MemoryEngine(shape, 1, (_, name, i) => value(name, i));
    await saveModel(engine.asEngine(), directory, { configJson: llama, maxShardBytes: 600 });
    expect(existsSync(join(directory, 'model.safetensors'))).toBe(false);
    const shards = readdirSync(directory)
      .filter((file) => /^model-\d{5}-of-\d{5}\.safetensors$/.test(file))
      .sort();
    expect(shards.length).toBeGreaterThan(2);
    const opened = await openCheckpoint(directory);
    for (const [name, tensor] of opened.tensors) {
      expect(await readFloat32(tensor)).toEqual(await engine.readTensor(name));
    }
    const indexPath = join(directory, 'model.safetensors.index.json');
    const index = JSON.parse(readFileSync(indexPath, 'utf8')) as { weight_map: Record<string, string> };
    const first = shards[0] as string;
    writeFileSync(indexPath, JSON.stringify({ weight_map: { ...index.weight_map, 'lm_head.weight': first } }));
    expect(await failure(openCheckpoint(directory))).toMatchObject({
      code: 'CHECKPOINT_TENSOR_MISSING',
      message: expect.stringMatching(/"lm_head.weight" is not in it/),
    });
    writeFileSync(indexPath, JSON.stringify({ weight_map: { a: 'model-00009-of-00009.safetensors' } }));
    expect(await failure(openCheckpoint(directory))).toMatchObject({
      code: 'CHECKPOINT_FILE_MISSING',
      message: expect.stringContaining('model-00009-of-00009.safetensors'),
    });
    writeFileSync(indexPath, JSON.stringify({ weight_map: { a: '../secret.safetensors' } }));
    expect(await failure(openCheckpoint(directory))).toMatchObject({ code: 'CHECKPOINT_CORRUPT' });
    writeFileSync(indexPath, '{"weight_map": 3}');
    expect(await failure(openCheckpoint(directory))).toMatchObject({ message: expect.stringContaining('weight_map') });
  });
});

describe('a shard', () => {
  /** A folder of several files, and the names of these. */
  async function sharded(config: Json = llama): Promise<{ directory: string; shards: string[] }> {
    const directory = temporaryDirectory();
    const engine = new MemoryEngine(parseModelConfig(config, 'config.json'), 1, (_, name, i) => value(name, i));
    await saveModel(engine.asEngine(), directory, { configJson: config, maxShardBytes: 600 });
    return { directory, shards: readdirSync(directory).filter((file) => /^model-.*\.safetensors$/.test(file)) };
  }
  const replaced = async (other: Json, from: number, to: number) => {
    const [{ directory, shards }, foreign] = [await sharded(), await sharded(other)];
    copyFileSync(join(foreign.directory, foreign.shards[from]!), join(directory, shards[to]!));
    return failure(plan({ directory, weights: '' }));
  };

  test('that is missing is named', async () => {
    const { directory, shards } = await sharded();
    rmSync(join(directory, shards[1]!));
    expect(await failure(openCheckpoint(directory))).toMatchObject({
      code: 'CHECKPOINT_FILE_MISSING',
      message: expect.stringMatching(new RegExp(`${shards[1]}: no such file`)),
    });
  });

  test('that is cut short is named', async () => {
    const { directory, shards } = await sharded();
    const file = join(directory, shards[1]!);
    truncateSync(file, readFileSync(file).length - 4);
    expect(await failure(openCheckpoint(directory))).toMatchObject({
      code: 'CHECKPOINT_CORRUPT',
      message: expect.stringContaining(shards[1]!),
    });
  });

  test('of another model is named, with its tensor and both shapes', async () => {
    expect(await replaced({ ...llama, vocab_size: 12 }, 0, 0)).toMatchObject({
      code: 'CHECKPOINT_TENSOR_SHAPE',
      details: { file: expect.stringContaining('model-00001-of'), expected: [11, 8], received: [12, 8] },
    });
  });

  test('in the place of another is named, with the tensor that it lacks', async () => {
    expect(await replaced(llama, 0, 1)).toMatchObject({
      code: 'CHECKPOINT_TENSOR_MISSING',
      details: { file: expect.stringContaining('model-00002-of'), tensor: expect.stringContaining('model.layers.0') },
    });
  });
});

describe('a checkpoint that does not fit', () => {
  test.each<[string, (tensors: { name: string; shape: readonly number[] }[]) => unknown, string, RegExp]>([
    [
      'a missing tensor',
      (tensors) => tensors.splice(2, 1),
      'CHECKPOINT_TENSOR_MISSING',
      /q_proj.weight" \[8, 8\] is missing/,
    ],
    [
      'a tensor of a wrong shape',
      (tensors) => {
        tensors[0]!.shape = [10, 8];
      },
      'CHECKPOINT_TENSOR_SHAPE',
      /embed_tokens.weight" has shape \[10, 8\]; config.json asks for \[11, 8\]/,
    ],
    [
      'a tensor of another rank',
      (tensors) => {
        tensors[2]!.shape = [8];
      },
      'CHECKPOINT_TENSOR_SHAPE',
      /has shape \[8\]; config.json asks for \[8, 8\]/,
    ],
  ])('%s is named', async (_, change, code, message) => {
    expect(await failure(plan(checkpoint(llama, change)))).toMatchObject({
      code,
      message: expect.stringMatching(message),
    });
  });

  test('a head that the checkpoint lacks is zero when asked for, an error otherwise', async () => {
    const opened = await openCheckpoint(checkpoint(llama).directory);
    const table = { shape: withHead(opened.shape, 'value'), parts: 1 };
    expect(() => loadPlan(opened, table)).toThrow(/score.weight.*no such head yet/);
    const { tensors, zeroed } = loadPlan(opened, table, { newHead: true });
    expect(zeroed).toEqual(['scalarHead', 'scalarHeadBias']);
    expect(tensors.some(({ name }) => name === 'lm_head.weight')).toBe(false);
    const trunkless = await openCheckpoint(checkpoint(llama, (tensors) => tensors.splice(2, 1)).directory);
    expect(() => loadPlan(trunkless, table, { newHead: true })).toThrow(/q_proj/);
  });

  test('a critic takes over the head of a reward model, its bias being new', async () => {
    const score = { ...gpt2, architectures: ['GPT2ForSequenceClassification'], id2label: { 0: 'LABEL_0' } };
    const opened = await openCheckpoint(checkpoint(score).directory);
    const critic = { shape: withHead(opened.shape, 'value'), parts: 1 };
    const { tensors, zeroed } = loadPlan(opened, critic, { newHead: true });
    expect(zeroed).toEqual(['scalarHeadBias']);
    expect(tensors.some(({ name, space }) => name === 'classifier.weight' && space === 'weights')).toBe(true);
  });

  test('a dtype that cannot be loaded is named', async () => {
    const written = checkpoint(llama);
    const bytes = readFileSync(written.weights);
    const length = Number(bytes.readBigUInt64LE());
    const header = bytes
      .subarray(8, 8 + length)
      .toString()
      .replaceAll('"F32"', '"I32"');
    writeFileSync(
      written.weights,
      Buffer.concat([bytes.subarray(0, 8), Buffer.from(header), bytes.subarray(8 + length)]),
    );
    expect(await failure(plan(written))).toMatchObject({
      code: 'CHECKPOINT_DTYPE',
      message: expect.stringContaining('I32'),
    });
  });

  test('missing and malformed files say which, and what to do', async () => {
    const empty = temporaryDirectory();
    expect(await failure(openCheckpoint(empty))).toMatchObject({
      code: 'CHECKPOINT_FILE_MISSING',
      message: expect.stringMatching(/config\.json: no such file/),
    });
    writeFileSync(join(empty, 'config.json'), '{"model_type": ');
    expect(await failure(openCheckpoint(empty))).toMatchObject({
      code: 'MODEL_CONFIG_INVALID',
      message: expect.stringMatching(/not JSON/),
    });
    writeFileSync(join(empty, 'config.json'), JSON.stringify(llama));
    expect(await failure(openCheckpoint(empty))).toMatchObject({
      code: 'CHECKPOINT_FILE_MISSING',
      message: expect.stringMatching(/no weights.*safetensors/),
    });
    const cut = checkpoint(llama);
    truncateSync(cut.weights, readFileSync(cut.weights).length - 10);
    expect(await failure(openCheckpoint(cut.directory))).toMatchObject({ code: 'CHECKPOINT_CORRUPT' });
  });
});

describe('the hub cache', () => {
  const cached = (name: string, commits: string[], main?: string) => {
    const cache = temporaryDirectory();
    const repository = join(cache, `models--${name.replace('/', '--')}`);
    for (const commit of commits) mkdirSync(join(repository, 'snapshots', commit), { recursive: true });
    if (main) {
      mkdirSync(join(repository, 'refs'), { recursive: true });
      writeFileSync(join(repository, 'refs', 'main'), main);
    }
    return { cache, repository };
  };

  test('a name resolves to the snapshot that refs/main names, or to the only one', async () => {
    const { cache, repository } = cached('org/name', ['aaa', 'bbb'], 'bbb\n');
    expect(await resolveModelDirectory('org/name', { HF_HUB_CACHE: cache })).toBe(join(repository, 'snapshots', 'bbb'));
    const single = cached('gpt2', ['ccc']);
    expect(await resolveModelDirectory('gpt2', { HF_HUB_CACHE: single.cache })).toBe(
      join(single.repository, 'snapshots', 'ccc'),
    );
    const unclear = cached('gpt2', ['ccc', 'ddd']);
    expect(await failure(resolveModelDirectory('gpt2', { HF_HUB_CACHE: unclear.cache }))).toMatchObject({
      code: 'MODEL_NOT_FOUND',
    });
  });

  test('a folder comes first; an absent name gives the download command, a path that is no name does not', async () => {
    const directory = temporaryDirectory();
    expect(await resolveModelDirectory(directory, {})).toBe(directory);
    const environment = { HF_HUB_CACHE: directory };
    expect(await failure(resolveModelDirectory('org/name', environment))).toMatchObject({
      code: 'MODEL_NOT_FOUND',
      message: expect.stringMatching(/hf download org\/name$/),
    });
    const error = await failure(resolveModelDirectory('./runs/a/b', environment));
    expect(error).toMatchObject({ code: 'MODEL_NOT_FOUND', message: expect.not.stringContaining('hf download') });
  });

  test('the cache folder follows the variables of huggingface_hub', () => {
    expect(hubCacheDirectory({ HF_HUB_CACHE: '/a', HF_HOME: '/b' })).toBe('/a');
    expect(hubCacheDirectory({ HF_HOME: '/b', XDG_CACHE_HOME: '/c' })).toBe('/b/hub');
    expect(hubCacheDirectory({ XDG_CACHE_HOME: '/c' })).toBe('/c/huggingface/hub');
    expect(hubCacheDirectory({})).toMatch(/\/\.cache\/huggingface\/hub$/);
  });
});

describe('saving', () => {
  const engineOf = (config: Json, head?: 'value' | 'score') => {
    const shape = parseModelConfig(config, 'config.json');
    return new MemoryEngine(head ? withHead(shape, head) : shape, 1, (space, name, i) => value(space + name, i));
  };

  test.each<[string, Json, 'value' | 'score' | undefined, string]>([
    ['a language model', llama, undefined, 'LlamaForCausalLM'],
    ['a critic', llama, 'value', 'LlamaForTokenClassification'],
    [
      'a reward model',
      { ...llama, pad_token_id: 3, num_labels: 7, problem_type: 'single_label_classification' },
      'score',
      'LlamaForSequenceClassification',
    ],
    ['a GPT-2 critic', gpt2, 'value', 'GPT2ForTokenClassification'],
  ])('%s opens again with the same shape and the same weights', async (_, config, head, architecture) => {
    const directory = temporaryDirectory();
    const engine = engineOf(config, head);
    await saveModel(engine.asEngine(), directory, { configJson: config });
    const opened = await openCheckpoint(directory);
    expect(opened.shape).toEqual(engine.shape);
    expect(opened.config.architectures).toEqual([architecture]);
    expect(opened.config.torch_dtype).toBe('float32');
    const { tensors } = loadPlan(opened, { shape: opened.shape, parts: 1 });
    expect(tensors.length).toBe(opened.tensors.size);
    for (const { name } of tensors) {
      expect(await readFloat32(opened.tensors.get(name)!)).toEqual(await engine.readTensor(name));
    }
    expect(readdirSync(directory).sort()).toEqual(['config.json', 'model.safetensors']);
  });

  test('the same engine gives the same bytes, whatever the folder', async () => {
    const [first, second] = [temporaryDirectory(), temporaryDirectory()];
    for (const directory of [first, second]) {
      await saveModel(engineOf(llama).asEngine(), directory, { configJson: { ...llama, _name_or_path: '/home/x' } });
    }
    for (const file of ['config.json', 'model.safetensors']) {
      expect(readFileSync(join(first, file)).equals(readFileSync(join(second, file)))).toBe(true);
    }
    expect(readFileSync(join(first, 'config.json'), 'utf8')).not.toContain('/home/x');
  });

  test('tokenizer files and generation settings are carried over, other files are not', async () => {
    const [from, to, critic] = [temporaryDirectory(), temporaryDirectory(), temporaryDirectory()];
    for (const file of ['tokenizer.json', 'chat_template.jinja', 'generation_config.json', 'notes.txt'])
      writeFileSync(join(from, file), file);
    const companions = await readCompanions(from);
    await saveModel(engineOf(llama).asEngine(), to, { configJson: llama, companions });
    const weights = ['config.json', 'model.safetensors'];
    expect(readdirSync(to).sort()).toEqual(
      ['chat_template.jinja', 'generation_config.json', 'tokenizer.json', ...weights].sort(),
    );
    await saveModel(engineOf(llama, 'value').asEngine(), critic, { configJson: llama, companions });
    expect(existsSync(join(critic, 'generation_config.json'))).toBe(false);
    expect(readFileSync(join(critic, 'tokenizer.json'), 'utf8')).toBe('tokenizer.json');
    mkdirSync(join(from, 'merges.txt'));
    expect(await failure(readCompanions(from))).toMatchObject({
      code: 'CHECKPOINT_UNREADABLE',
      message: expect.stringContaining(join(from, 'merges.txt')),
    });
  });

  test("another model's config is refused before anything is written", async () => {
    const directory = join(temporaryDirectory(), 'new');
    const saving = saveModel(engineOf(llama).asEngine(), directory, { configJson: { ...llama, hidden_size: 16 } });
    expect(await failure(saving)).toMatchObject({
      code: 'CHECKPOINT_CONFIG_MISMATCH',
      message: expect.stringMatching(/width is 16/),
    });
    expect(existsSync(directory)).toBe(false);
  });

  test('a full disk is CHECKPOINT_WRITE_FAILED with path and cause, and no half file stays', async () => {
    const directory = temporaryDirectory();
    const file = join(directory, 'model.safetensors');
    symlinkSync('/dev/full', `${file}.partial`);
    expect(await failure(saveModel(engineOf(llama).asEngine(), directory, { configJson: llama }))).toMatchObject({
      code: 'CHECKPOINT_WRITE_FAILED',
      message: expect.stringMatching(/model\.safetensors: ENOSPC, the disk is full/),
      details: { path: file, cause: 'ENOSPC' },
    });
    expect(readdirSync(directory)).toEqual([]);
  });

  test('an output that cannot be a folder is CHECKPOINT_WRITE_FAILED', async () => {
    const file = join(temporaryDirectory(), 'a-file');
    writeFileSync(file, '');
    expect(await failure(saveModel(engineOf(llama).asEngine(), join(file, 'x'), { configJson: llama }))).toMatchObject({
      code: 'CHECKPOINT_WRITE_FAILED',
      message: expect.stringMatching(/a part of the path is a file/),
    });
  });

  test.each(['EROFS', 'EACCES'])('%s is explained; an error that is not of the system passes unchanged', (code) => {
    const system = Object.assign(new Error(code), { code, syscall: 'open' });
    expect(writeFailure('/out', system)).toMatchObject({
      code: 'CHECKPOINT_WRITE_FAILED',
      details: { path: '/out', cause: code },
    });
    const other = new TypeError('bug');
    expect(writeFailure('/out', other)).toBe(other);
  });
});

describe('optimizer state', () => {
  const shape = parseModelConfig(llama, 'config.json');

  test('comes back into another engine bit for bit', async () => {
    const directory = temporaryDirectory();
    const engine = new MemoryEngine(shape, 1, (space, name, i) => value(space + name, i));
    const other = new MemoryEngine(shape);
    await saveOptimizerState(engine.asEngine(), directory);
    await loadOptimizerState(other.asEngine(), directory);
    for (const [key, data] of engine.values) {
      if (key.startsWith('moment')) expect(other.values.get(key)).toEqual(data);
      else expect(other.values.get(key)).not.toEqual(data);
    }
  });

  test('of another model, or damaged, is refused before anything is read, with file, tensor and both sides', async () => {
    const directory = temporaryDirectory();
    await saveOptimizerState(new MemoryEngine(shape, 1, () => 1).asEngine(), directory);
    const check = async (config: Json, code: string, details: Json) => {
      const engine = new MemoryEngine(parseModelConfig(config, 'config.json'));
      expect(await failure(loadOptimizerState(engine.asEngine(), directory))).toMatchObject({ code, details });
      for (const data of engine.values.values()) expect(data.every((x) => x === 0)).toBe(true);
    };
    const file = join(directory, 'optimizer.safetensors');
    const tensor = 'moment1.model.embed_tokens.weight';
    const shapes = { file, tensor, expected: [12, 8], received: [11, 8] };
    await check({ ...llama, vocab_size: 12 }, 'CHECKPOINT_TENSOR_SHAPE', shapes);
    const lacking = { file, tensor: 'moment1.model.layers.1.input_layernorm.weight', expected: [8] };
    await check({ ...llama, num_hidden_layers: 2 }, 'CHECKPOINT_TENSOR_MISSING', lacking);
    const extra = { file, tensor: 'moment1.lm_head.weight' };
    await check({ ...llama, tie_word_embeddings: true }, 'CHECKPOINT_TENSOR_MISSING', extra);
    const whole = readFileSync(file);
    writeFileSync(file, Buffer.from(whole.toString('latin1').replaceAll('"F32"', '"I32"'), 'latin1'));
    await check(llama, 'CHECKPOINT_DTYPE', { file, tensor, expected: 'F32', received: 'I32' });
    writeFileSync(file, whole.subarray(0, -4));
    await check(llama, 'CHECKPOINT_CORRUPT', { file });
    expect(
      await failure(loadOptimizerState(new MemoryEngine(shape).asEngine(), join(directory, 'none'))),
    ).toMatchObject({
      code: 'CHECKPOINT_FILE_MISSING',
    });
  });
});
