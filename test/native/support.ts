/** Engines of the tests: checkpoints of the fixtures, a small random model, and comparison bit by bit. */
import { spawn } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { onTestFinished, test } from 'vitest';
import { checkpointTensors, openCheckpoint, saveModel } from '../../src/checkpoints/hugging-face.js';
import { createDevice, createEngine } from '../../src/checkpoints/load-model.js';
import { packBatch } from '../../src/data/batch.js';
import type { Device, DeviceOptions } from '../../src/engine/device.js';
import type {
  Dtype,
  Engine,
  Generated,
  GenerateOptions,
  GenerateRequest,
  ParameterSpace,
} from '../../src/engine/engine.js';
import { generationRows, generationSequences, sampledRows } from '../../src/engine/generation-needs.js';
import { loadNative } from '../../src/engine/native.js';
import { NativeEngine } from '../../src/engine/native-engine.js';
import { pagePositions, planGeneration } from '../../src/layout/memory-plan.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { resolveParts } from '../../src/layout/parts.js';
import { slow } from '../conditions.js';
import { goldenDirectories, readGolden } from './golden.js';

export const dtypes: readonly Dtype[] = ['float32', 'bfloat16'];

/** A law of each of many models in every dtype. The short suite takes a model in one of them, in turn. */
export function testDtypes(index: number, name: string, run: (dtype: Dtype) => Promise<void>): void {
  for (const [i, dtype] of dtypes.entries()) {
    (index % dtypes.length === i ? test : slow)(`${name}, ${dtype}`, () => run(dtype));
  }
}

/** A model that can be opened again and again, always with the same weights. */
export interface TestModel {
  name: string;
  shape: ModelShape;
  open(options: OpenOptions): Promise<NativeEngine>;
}

export interface OpenOptions {
  device: Device;
  dtype: Dtype;
  train?: boolean;
  recompute?: boolean;
  parts?: number;
}

/** What decides which code runs: features, and remainders of dimensions. */
function features(s: ModelShape): string {
  const tails = [s.width, s.headWidth, s.feedForward, s.vocabulary].map((dimension) => dimension % 16);
  const biases = [s.qkvBias, s.outputBias, s.mlpBias];
  const window = s.windows.some((width) => width > 0);
  return JSON.stringify([
    s.norm,
    s.activation,
    s.positions.type,
    s.headNorm,
    s.tied,
    biases,
    window,
    tails,
    s.heads / s.keyValueHeads,
  ]);
}

/** Language models among the fixtures, one of each kind. */
export async function fixtureModels(): Promise<TestModel[]> {
  const models = new Map<string, TestModel>();
  for (const { name, directory } of goldenDirectories()) {
    if (readGolden(directory).kind !== 'lm') continue;
    const checkpoint = await openCheckpoint(directory);
    const { shape } = checkpoint;
    const key = features(shape);
    if (!models.has(key)) {
      models.set(key, { name, shape, open: (options) => createEngine({ model: checkpoint, ...options }) });
    }
  }
  return [...models.values()];
}

/** Numbers in [0, 1), the same for the same seed (mulberry32). */
export function random(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), state | 1);
    x ^= x + Math.imul(x ^ (x >>> 7), x | 61);
    return ((x ^ (x >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** The 25-million-parameter Llama of the benches, cut down: 3 layers, 8 parts possible, a vocabulary with an odd tail. */
export const smallShape: ModelShape = {
  family: 'llama',
  vocabulary: 1000,
  width: 256,
  layers: 3,
  heads: 8,
  keyValueHeads: 4,
  headWidth: 32,
  feedForward: 704,
  norm: 'rms',
  normEpsilon: 1e-5,
  activation: 'swiglu',
  qkvBias: false,
  outputBias: false,
  mlpBias: false,
  headNorm: false,
  positions: { type: 'rope', theta: 10000, scaling: { type: 'default' } },
  maxPositions: 1100,
  windows: [0, 0, 0],
  head: 'language',
  headBias: false,
  tied: false,
  padToken: null,
};

/** Two layers of 64 columns: thousands of forward passes take a second. */
export const tinyShape: ModelShape = {
  ...smallShape,
  vocabulary: 97,
  width: 64,
  layers: 2,
  heads: 4,
  keyValueHeads: 2,
  headWidth: 16,
  feedForward: 112,
  windows: [0, 24],
};

/** The largest power of two up to 8 that the model can be cut into. */
export function mostParts(shape: ModelShape): number {
  for (const parts of [8, 4, 2]) {
    try {
      return resolveParts(shape, parts);
    } catch {
      // the next smaller power of two
    }
  }
  return 1;
}

/** Removed when the test ends. */
export function temporaryDirectory(): string {
  const directory = mkdtempSync(join(tmpdir(), 'lockstep-'));
  onTestFinished(() => rmSync(directory, { recursive: true, force: true }));
  return directory;
}

/** A model with random weights: norms near 1, the rest such that no layer dies out. */
export function randomModel(name: string, shape: ModelShape, seed = 1): TestModel {
  const tensors = new Map<string, Float32Array>();
  const open = async ({ parts = 1, ...options }: OpenOptions): Promise<NativeEngine> => {
    const engine = new NativeEngine({ shape, parts, ...options });
    if (tensors.size === 0) {
      const next = random(seed);
      for (const tensor of checkpointTensors(engine)) tensors.set(tensor.name, randomTensor(tensor.shape, next));
    }
    for (const [tensor, data] of tensors) await engine.writeTensor(tensor, data);
    await engine.publish();
    return engine;
  };
  return { name, shape, open };
}

/** Writes a model of the Llama family as a checkpoint that never ends a text by itself: responses have their full length. */
export async function writeCheckpoint(model: TestModel, directory: string): Promise<string> {
  const { shape } = model;
  const configJson = {
    ...{ architectures: ['LlamaForCausalLM'], model_type: 'llama', vocab_size: shape.vocabulary },
    ...{ hidden_size: shape.width, intermediate_size: shape.feedForward, num_hidden_layers: shape.layers },
    ...{ num_attention_heads: shape.heads, num_key_value_heads: shape.keyValueHeads, head_dim: shape.headWidth },
    ...{ max_position_embeddings: shape.maxPositions, rms_norm_eps: shape.normEpsilon, rope_theta: 10000 },
    ...{ hidden_act: 'silu', tie_word_embeddings: shape.tied, eos_token_id: null, pad_token_id: shape.padToken },
  };
  await withEngine(model, { dtype: 'float32' }, (engine) => saveModel(engine, directory, { configJson }));
  return directory;
}

function randomTensor(shape: readonly number[], next: () => number): Float32Array {
  const size = shape.reduce((product, n) => product * n, 1);
  const scale = shape.length === 1 ? 0.1 : 3 / Math.sqrt(shape.at(-1)!);
  return Float32Array.from({ length: size }, () => (shape.length === 1 ? 1 : 0) + scale * (2 * next() - 1));
}

export function sequencesOf(shape: ModelShape, lengths: readonly number[], seed = 7): Int32Array[] {
  const next = random(seed);
  return lengths
    .filter((length) => length <= shape.maxPositions)
    .map((length) => Int32Array.from({ length }, () => Math.floor(next() * shape.vocabulary)));
}

/** Runs with an engine of its own device, and closes both. */
export async function withEngine<T>(
  model: TestModel,
  { isa, ...options }: DeviceOptions & Omit<OpenOptions, 'device'> & { isa?: string },
  run: (engine: NativeEngine, device: Device) => Promise<T>,
): Promise<T> {
  const {
    threads = 2,
    memoryBytes,
    hostBytes,
    offloadFolder,
    implementation,
    processor,
    poison,
    logits,
    ...rest
  } = options;
  const device = withIsa(isa, () =>
    createDevice({
      threads,
      ...(memoryBytes === undefined ? {} : { memoryBytes }),
      ...(hostBytes === undefined ? {} : { hostBytes }),
      ...(offloadFolder === undefined ? {} : { offloadFolder }),
      ...(implementation === undefined ? {} : { implementation }),
      ...(processor === undefined ? {} : { processor }),
      ...(poison === undefined ? {} : { poison }),
      ...(logits === undefined ? {} : { logits }),
    }),
  );
  try {
    const engine = await model.open({ device, ...rest });
    try {
      return await run(engine, device);
    } finally {
      await engine.close();
    }
  } finally {
    await device.close();
  }
}

/** LOCKSTEP_ISA while `run` runs; undefined leaves it as it is. */
export function withIsa<T>(isa: string | undefined, run: () => T): T {
  if (isa === undefined) return run();
  const before = process.env.LOCKSTEP_ISA;
  process.env.LOCKSTEP_ISA = isa;
  try {
    return run();
  } finally {
    if (before === undefined) delete process.env.LOCKSTEP_ISA;
    else process.env.LOCKSTEP_ISA = before;
  }
}

/** Instruction sets that this CPU has. */
export function instructionSets(): string[] {
  return ['avx2', 'avx512', 'avx512-bf16'].filter((name) => {
    try {
      return loadNative().instructionSet(name) === name;
    } catch {
      return false;
    }
  });
}

/** Log-probs and entropies of one sequence: the last token's log-prob is 0 by contract. */
export interface Scores {
  logprobs: Float32Array;
  entropies: Float32Array;
}

/** One forward pass over all sequences. */
export async function scoreTogether(
  engine: Engine,
  sequences: readonly Int32Array[],
  { keep = false, temperature = 1 } = {},
): Promise<Scores[]> {
  const result = await engine.forward(packBatch(sequences), { outputs: ['logprobs', 'entropies'], keep, temperature });
  let end = 0;
  return sequences.map(({ length }) => {
    end += length;
    return {
      logprobs: result.logprobs!.slice(end - length, end),
      entropies: result.entropies!.slice(end - length, end),
    };
  });
}

/** A forward pass for each sequence. */
export async function scoreAlone(
  engine: Engine,
  sequences: readonly Int32Array[],
  options: { keep?: boolean; temperature?: number } = {},
): Promise<Scores[]> {
  const scores: Scores[] = [];
  for (const sequence of sequences) scores.push(...(await scoreTogether(engine, [sequence], options)));
  return scores;
}

/**
 * On a device with `poison`: leaves the workspace full of NaN, by a generation whose pages cover it and are freed. Returns its
 * size; a call that needs more would get fresh memory.
 */
export async function fillWithNaN(engine: NativeEngine): Promise<number> {
  const { maxPositions, vocabulary } = engine.shape;
  const requests = Array.from({ length: 40 }, (_, id) => ({ prompt: Int32Array.of(id), id }));
  const stopTokens = Array.from({ length: vocabulary }, (_, token) => token);
  await engine.generate(requests, { ...sampling, maxNewTokens: maxPositions - 1, stopTokens });
  return engine.memory().workspace!.planned;
}

/** Throws at the first float that is not finite or differs in any bit. */
export function sameBits(actual: ArrayLike<number>, expected: ArrayLike<number>, what: string): void {
  if (actual.length !== expected.length) {
    throw new Error(`${what}: ${actual.length} numbers, expected ${expected.length}`);
  }
  for (let i = 0; i < expected.length; i++) {
    if (!Object.is(actual[i], expected[i]) || !Number.isFinite(actual[i])) {
      throw new Error(`${what}[${i}]: ${actual[i]}, expected ${expected[i]} exactly`);
    }
  }
}

export function sameScores(actual: readonly Scores[], expected: readonly Scores[], what: string): void {
  if (actual.length !== expected.length) throw new Error(`${what}: ${actual.length} of ${expected.length} sequences`);
  for (const [i, { logprobs, entropies }] of expected.entries()) {
    sameBits(actual[i]!.logprobs, logprobs, `${what}: logprobs of sequence ${i} (${logprobs.length} tokens)`);
    sameBits(actual[i]!.entropies, entropies, `${what}: entropies of sequence ${i} (${logprobs.length} tokens)`);
  }
}

export const joined = (arrays: readonly Float32Array[]): Float32Array =>
  Float32Array.from(arrays.flatMap((array) => [...array]));

/** Every tensor of one space, by name. */
export async function readAll(engine: Engine, space: ParameterSpace): Promise<Map<string, Float32Array>> {
  const all = new Map<string, Float32Array>();
  for (const { name } of checkpointTensors(engine)) {
    if (!all.has(name)) all.set(name, await engine.readTensor(name, space));
  }
  return all;
}

export function sameTensors(
  actual: ReadonlyMap<string, Float32Array>,
  expected: ReadonlyMap<string, Float32Array>,
  what: string,
): void {
  if (actual.size !== expected.size) throw new Error(`${what}: ${actual.size} of ${expected.size} tensors`);
  for (const [name, data] of expected) sameBits(actual.get(name)!, data, `${what}: ${name}`);
}

/** memoryBytes of a device whose generation has so many pages of keys and values. */
export function budgetForPages(
  engine: NativeEngine,
  heldBytes: number,
  requests: readonly GenerateRequest[],
  pages: number,
  speculation = 0,
): number {
  const sequences = sampledRows(Math.min(requests.length, generationSequences), speculation);
  const prompts = requests.reduce((sum, { prompt }) => sum + prompt.length, 0);
  const rows = Math.max(sequences, Math.min(prompts, generationRows));
  return heldBytes + planGeneration(engine.shape, engine.dtype, { rows, sequences, pages }).total;
}

/** Pages that one request needs at its longest. */
export const pagesOf = (positions: number): number => Math.ceil(positions / pagePositions);

export const sampling: GenerateOptions = {
  maxNewTokens: 24,
  temperature: 1,
  topP: 1,
  topK: 0,
  stopTokens: [],
  seed: 11,
};

/** Requests with ids 0, 1, ... */
export const requestsOf = (prompts: readonly Int32Array[]): GenerateRequest[] =>
  prompts.map((prompt, id) => ({ prompt, id }));

/** Prompt and new tokens read in one scoring pass must give the log-probs that sampling reported. */
export async function generatedAsScored(
  engine: Engine,
  prompts: readonly Int32Array[],
  generated: readonly Generated[],
  temperature: number,
): Promise<void> {
  const texts = generated.map(({ tokens }, i) => Int32Array.from([...prompts[i]!, ...tokens]));
  const scores = await scoreTogether(engine, texts, { temperature: temperature === 0 ? 1 : temperature });
  for (const [i, { logprobs }] of generated.entries()) {
    const first = prompts[i]!.length - 1;
    const expected = scores[i]!.logprobs.subarray(first, first + logprobs.length);
    sameBits(logprobs, expected, `log-probs of request ${i}, temperature ${temperature}`);
  }
}

/** The same text, log-probs and end. */
export function sameGenerated(actual: Generated, expected: Generated, what: string): void {
  sameBits(actual.tokens, expected.tokens, `${what}: tokens`);
  sameBits(actual.logprobs, expected.logprobs, `${what}: log-probs`);
  if (actual.finish !== expected.finish) throw new Error(`${what}: ended by ${actual.finish}, not ${expected.finish}`);
}

export interface Ended {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

/** Address of a module of the built library, for code of other processes and threads. */
export function built(module: string): string {
  const file = resolve('dist', module);
  if (!existsSync(file)) throw new Error(`${file} is missing: run npm run build first`);
  return JSON.stringify(pathToFileURL(file).href);
}

/**
 * Code for a process or thread of its own: `open(threads, train)` gives `{ device, engine }`, a model of `shape` in float32
 * with all weights zero; `text(n)` is a sequence of n tokens.
 */
export const childPrelude = (shape: ModelShape): string => `
const { createDevice } = await import(${built('checkpoints/load-model.js')});
const { NativeEngine } = await import(${built('engine/native-engine.js')});
const { checkpointTensors } = await import(${built('checkpoints/hugging-face.js')});
const shape = ${JSON.stringify(shape)};
const text = (length) => Int32Array.from({ length }, (_, i) => (i * 31) % shape.vocabulary);
const open = (threads = 2, train = false) => {
  const device = createDevice({ threads });
  return { device, engine: new NativeEngine({ shape, device, dtype: 'float32', train }) };
};
const forward = (engine, lengths, keep = false) =>
  engine.forward(
    { tokens: text(lengths.reduce((a, b) => a + b)), lengths: Int32Array.from(lengths) },
    { outputs: ['logprobs'], keep },
  );
`;

/** Runs an ES module in a node process of its own. */
export function runModule(code: string, nodeOptions: readonly string[] = []): Promise<Ended> {
  const child = spawn(process.execPath, [...nodeOptions, '--input-type=module', '--eval', code], {
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (chunk) => {
    stdout += chunk;
  });
  child.stderr.on('data', (chunk) => {
    stderr += chunk;
  });
  return new Promise((done) => {
    child.on('close', (code, signal) => done({ code, signal, stdout, stderr }));
  });
}
