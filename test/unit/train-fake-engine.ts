/**
 * A language model small enough to check by hand: the next token's logits are embed[token] . lm_head, a value is
 * embed[token] . score (+ bias). It keeps all tensors of a tiny Llama checkpoint, learns with AdamW in double precision, and
 * samples as a function of (seed, id, position) only.
 */
import { mkdir, mkdtemp, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Checkpoint, checkpointTensors } from '../../src/checkpoints/hugging-face.js';
import { writeSafetensors } from '../../src/checkpoints/safetensors.js';
import type { TokenBatch } from '../../src/data/batch.js';
import { philox } from '../../src/data/sampler.js';
import { accumulateInTurn } from '../../src/engine/accumulate.js';
import type {
  Engine,
  FileTensor,
  ForwardOptions,
  ForwardResult,
  Generated,
  GenerateOptions,
  GenerateRequest,
  GradientsOf,
  MicroBatches,
  ParameterSpace,
  Saving,
  StepOptions,
  TokenGradients,
} from '../../src/engine/engine.js';
import type { Backend } from '../../src/inference/backend.js';
import { parseModelConfig, withHead } from '../../src/layout/config.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { loadFiles, readFloat32, saveFiles } from './fake-files.js';

const config = {
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_size: 8,
  intermediate_size: 8,
  num_attention_heads: 2,
  num_key_value_heads: 2,
  num_hidden_layers: 1,
  vocab_size: 24,
  max_position_embeddings: 64,
  rms_norm_eps: 1e-6,
  rope_theta: 10000,
  hidden_act: 'silu',
  tie_word_embeddings: false,
  eos_token_id: 1,
  torch_dtype: 'float32',
};

/** Writes a checkpoint of the table model; `changes` go into config.json. */
export async function writeTableModel(changes: Record<string, unknown> = {}, salt = 0): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'lockstep-table-'));
  await mkdir(directory, { recursive: true });
  const json = { ...config, ...changes };
  const shape = parseModelConfig(json, 'config.json');
  await writeFile(join(directory, 'config.json'), JSON.stringify(json));
  const tensors = checkpointTensors({ shape, parts: 1 });
  await writeSafetensors(join(directory, 'model.safetensors'), tensors, async (name) => {
    const index = tensors.findIndex((tensor) => tensor.name === name);
    const size = tensors[index]!.shape.reduce((a, b) => a * b, 1);
    return Float32Array.from({ length: size }, (_, i) => uniform(salt, index, i) - 0.5);
  });
  return directory;
}

function uniform(a: number, b: number, c: number): number {
  return philox([a, 7], [b, c, 0, 0])[0]! / 2 ** 32;
}

type Space = Map<string, Float32Array>;

export class TableEngine implements Engine {
  readonly dtype = 'float32';
  readonly parts = 1;
  readonly replicas = 1;
  readonly spaces: Record<ParameterSpace, Space> = {
    weights: new Map(),
    moment1: new Map(),
    moment2: new Map(),
    gradients: new Map(),
  };
  /** Adds to every log-prob of a forward pass: an engine whose training differs from its sampling. */
  static forwardError = 0;
  private readonly distributions = new Map<string, Float64Array>();
  private kept: { batch: TokenBatch; temperature: number } | undefined;

  constructor(readonly shape: ModelShape) {
    for (const { name, shape: extents } of checkpointTensors(this)) {
      for (const space of Object.values(this.spaces)) {
        space.set(name, new Float32Array(extents.reduce((a, b) => a * b, 1)));
      }
    }
  }

  async forward(batch: TokenBatch, { temperature = 1, keep = false }: ForwardOptions): Promise<ForwardResult> {
    if (keep) this.kept = { batch, temperature };
    const size = batch.tokens.length;
    const result = {
      logprobs: new Float32Array(size),
      entropies: new Float32Array(size),
      values: new Float32Array(size),
    };
    this.walk(batch, (t, token, next) => {
      result.values[t] = this.value(token);
      if (this.shape.head !== 'language') return;
      const p = this.distribution(token, temperature);
      result.entropies[t] = -p.reduce((sum, x) => sum + x * Math.log(x), 0);
      if (next !== undefined) result.logprobs[t] = Math.log(p[next]!) + TableEngine.forwardError;
    });
    return result;
  }

  async backward({ logprobs, entropies, values }: TokenGradients): Promise<void> {
    const { batch, temperature } = this.kept!;
    this.kept = undefined;
    this.walk(batch, (t, token, next) => {
      if (values?.[t]) this.backwardValue(token, values[t]!);
      if (this.shape.head !== 'language') return;
      const p = this.distribution(token, temperature);
      const entropy = -p.reduce((sum, x) => sum + x * Math.log(x), 0);
      const dLogits = p.map((x, v) => {
        const ofLogprob = next === undefined ? 0 : (logprobs?.[t] ?? 0) * (Number(v === next) - x);
        return (ofLogprob - (entropies?.[t] ?? 0) * x * (Math.log(x) + entropy)) / temperature;
      });
      this.backwardLogits(token, dLogits);
    });
  }

  forwardEach(batches: readonly TokenBatch[], options: Omit<ForwardOptions, 'keep'>): Promise<ForwardResult[]> {
    return Promise.all(batches.map((batch) => this.forward(batch, options)));
  }

  accumulate([own = []]: MicroBatches, options: Omit<ForwardOptions, 'keep'>, gradientsOf: GradientsOf): Promise<void> {
    return accumulateInTurn(this, own, options, (outputs, index) => gradientsOf(outputs, 0, index));
  }

  async step({ learningRate, betas, epsilon, weightDecay, clipNorm, step }: StepOptions) {
    const { weights, gradients, moment1, moment2 } = this.spaces;
    let squares = 0;
    for (const gradient of gradients.values()) for (const g of gradient) squares += g * g;
    const gradientNorm = Math.sqrt(squares);
    const scale = clipNorm > 0 ? Math.min(1, clipNorm / (gradientNorm + 1e-6)) : 1;
    for (const [name, w] of weights) {
      const [g, m, v] = [gradients.get(name)!, moment1.get(name)!, moment2.get(name)!];
      for (let i = 0; i < w.length; i++) {
        m[i] = betas[0] * m[i]! + (1 - betas[0]) * g[i]! * scale;
        v[i] = betas[1] * v[i]! + (1 - betas[1]) * (g[i]! * scale) ** 2;
        const update = m[i]! / (1 - betas[0] ** step) / (Math.sqrt(v[i]! / (1 - betas[1] ** step)) + epsilon);
        w[i] = w[i]! * (1 - learningRate * weightDecay) - learningRate * update;
      }
      g.fill(0);
    }
    this.distributions.clear();
    return { gradientNorm };
  }

  async generate(requests: readonly GenerateRequest[], options: GenerateOptions): Promise<Generated[]> {
    return requests.map(({ prompt, id, maxNewTokens = options.maxNewTokens }, r) => {
      const tokens: number[] = [];
      const logprobs: number[] = [];
      let token = prompt.at(-1)!;
      while (tokens.length < maxNewTokens && !options.stopTokens.includes(tokens.at(-1)!)) {
        const p = this.distribution(token, options.temperature || 1);
        const key: [number, number] = [Number(options.seed), Number(id) % 2 ** 32];
        const uniform = philox(key, [tokens.length, Math.floor(Number(id) / 2 ** 32), 0, 0])[0]! / 2 ** 32;
        token = options.temperature === 0 ? p.indexOf(Math.max(...p)) : inverse(p, uniform);
        tokens.push(token);
        logprobs.push(Math.log(p[token]!));
        // A request to end comes too late for this engine, as it may for any.
        options.onProgress?.({ requests: Int32Array.of(r), tokens: Int32Array.of(token), total: tokens.length });
      }
      return {
        tokens: Int32Array.from(tokens),
        logprobs: Float32Array.from(logprobs),
        finish: options.stopTokens.includes(tokens.at(-1)!) ? 'stop' : 'length',
      };
    });
  }

  async readTensor(name: string, space: ParameterSpace = 'weights'): Promise<Float32Array> {
    return this.spaces[space].get(name)!.slice();
  }

  async writeTensor(name: string, data: Float32Array, space: ParameterSpace = 'weights'): Promise<void> {
    this.spaces[space].get(name)!.set(data);
    this.distributions.clear();
  }

  async publish(): Promise<void> {}
  load(tensors: readonly FileTensor[]): Promise<void> {
    return loadFiles(this, tensors);
  }
  save(tensors: readonly FileTensor[], options: { copy?: boolean } = {}): Promise<Saving> {
    return saveFiles(this, tensors, options);
  }
  memory() {
    return {};
  }
  async close(): Promise<void> {}
  async [Symbol.asyncDispose](): Promise<void> {}

  private walk({ tokens, lengths }: TokenBatch, visit: (t: number, token: number, next: number | undefined) => void) {
    let t = 0;
    for (const length of lengths) {
      for (let i = 0; i < length; i++, t++) visit(t, tokens[t]!, i + 1 < length ? tokens[t + 1]! : undefined);
    }
  }

  private row(name: string, index: number, space: ParameterSpace = 'weights'): Float32Array {
    const { width } = this.shape;
    return this.spaces[space].get(name)!.subarray(index * width, (index + 1) * width);
  }

  private distribution(token: number, temperature: number): Float64Array {
    const key = `${token} ${temperature}`;
    const known = this.distributions.get(key) ?? this.softmax(token, temperature);
    this.distributions.set(key, known);
    return known;
  }

  private softmax(token: number, temperature: number): Float64Array {
    const x = this.row('model.embed_tokens.weight', token);
    const logits = Float64Array.from(
      { length: this.shape.vocabulary },
      (_, v) => dot(x, this.row('lm_head.weight', v)) / temperature,
    );
    const top = Math.max(...logits);
    const exps = logits.map((z) => Math.exp(z - top));
    const total = exps.reduce((a, b) => a + b, 0);
    return exps.map((e) => e / total);
  }

  private value(token: number): number {
    const score = this.spaces.weights.get('score.weight');
    if (!score) return 0;
    return dot(this.row('model.embed_tokens.weight', token), score) + (this.spaces.weights.get('score.bias')?.[0] ?? 0);
  }

  private backwardLogits(token: number, dLogits: Float64Array): void {
    const x = this.row('model.embed_tokens.weight', token);
    const dx = this.row('model.embed_tokens.weight', token, 'gradients');
    dLogits.forEach((d, v) => {
      const w = this.row('lm_head.weight', v);
      const dw = this.row('lm_head.weight', v, 'gradients');
      for (let k = 0; k < x.length; k++) {
        dx[k]! += d * w[k]!;
        dw[k]! += d * x[k]!;
      }
    });
  }

  private backwardValue(token: number, d: number): void {
    const x = this.row('model.embed_tokens.weight', token);
    const dx = this.row('model.embed_tokens.weight', token, 'gradients');
    const w = this.row('score.weight', 0);
    const dw = this.row('score.weight', 0, 'gradients');
    for (let k = 0; k < x.length; k++) {
      dx[k]! += d * w[k]!;
      dw[k]! += d * x[k]!;
    }
    const bias = this.spaces.gradients.get('score.bias');
    if (bias) bias[0]! += d;
  }
}

/** The first index at which the cumulative distribution exceeds u. */
function inverse(p: Float64Array, u: number): number {
  let left = u;
  for (let v = 0; v < p.length; v++) {
    left -= p[v]!;
    if (left < 0) return v;
  }
  return p.length - 1;
}

function dot(a: Float32Array, b: Float32Array): number {
  let sum = 0;
  for (let k = 0; k < a.length; k++) sum += a[k]! * b[k]!;
  return sum;
}

async function loadTable(checkpoint: Checkpoint, head: ModelShape['head']): Promise<TableEngine> {
  const engine = new TableEngine(withHead(checkpoint.shape, head));
  for (const { name } of checkpointTensors(engine)) {
    const stored = checkpoint.tensors.get(name);
    if (stored) await engine.writeTensor(name, await readFloat32(stored));
  }
  return engine;
}

export const tableBackend: Backend = {
  openDevice: async () => ({
    createEngine: (checkpoint, { head }) => loadTable(checkpoint, head ?? checkpoint.shape.head),
    close: async () => {},
  }),
};
