/** What the benches share: medians with spread, devices, and random models of the shapes in bench/shapes and test/fixtures/configs. */
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { saveModel } from '../src/checkpoints/hugging-face.js';
import { createDevice } from '../src/checkpoints/load-model.js';
import type { Measurement } from '../src/cli/bench.js';
import type { Device } from '../src/engine/device.js';
import type { Engine } from '../src/engine/engine.js';
import { loadNative, type NativeBench, resolveProcessor } from '../src/engine/native.js';
import { NativeEngine } from '../src/engine/native-engine.js';
import { parseModelConfig, withHead } from '../src/layout/config.js';
import type { Head, ModelShape } from '../src/layout/model-shape.js';
import type { TensorSpec } from '../src/layout/tensor-table.js';

export interface Spread {
  median: number;
  min: number;
  max: number;
}

export function spread(values: readonly number[]): Spread {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
  return { median, min: sorted[0]!, max: sorted.at(-1)! };
}

export const round = (x: number, digits = 4): number => Number(x.toPrecision(digits));

/** A line: the median of what was measured, with its least and most, and what else is known. */
export function measured(
  name: string,
  values: readonly number[],
  unit: string,
  more: Record<string, unknown> = {},
): Measurement {
  const { median, min, max } = spread(values);
  return { name, value: round(median), unit, min: round(min), max: round(max), ...more };
}

/** Seconds of `run`, `runs` times after one that is not counted. */
export async function secondsOf(runs: number, run: () => Promise<unknown>): Promise<number[]> {
  const seconds: number[] = [];
  for (let i = 0; i <= runs; i++) {
    const start = performance.now();
    await run();
    if (i > 0) seconds.push((performance.now() - start) / 1000);
  }
  return seconds;
}

/** What is measured, on the processor that LOCKSTEP_DEVICE or the machine chooses. */
export interface Subject {
  /** A shape, and one that several models of fit beside each other. */
  model: string;
  small: string;
  /** Shapes whose products are measured, with so many rows. */
  products: readonly string[];
  rows: readonly number[];
  dtypes: readonly ('float32' | 'bfloat16')[];
  /** Sequences of a training step. */
  sequences: number;
  length: number;
  /** Sequences that are decoded together, from a prompt on. */
  batches: readonly number[];
  promptTokens: number;
  newTokens: number;
  /** Parameters that the optimizer updates: 18 bytes each, more than caches hold. */
  updated: number;
  /** Of an iteration of reinforcement learning. */
  rollout: { sequences: number; promptTokens: number; newTokens: number; microTokens: number };
  /** Memory that no cache holds. */
  ceilingBytes: number;
  /** What the vendor states of dense bfloat16 products summed in float32, and of memory; absent where it is not known. */
  stated?: { flops: number; bytes: number };
}

const onCpu: Subject = {
  ...{ model: 'llama-25m', small: 'llama-25m', products: ['llama-25m', 'llama-125m'], rows: [32, 512, 2048] },
  ...{ dtypes: ['bfloat16', 'float32'], sequences: 8, length: 256 },
  ...{ batches: [1, 4, 32], promptTokens: 128, newTokens: 128 },
  updated: 27_787_264,
  rollout: { sequences: 32, promptTokens: 64, newTokens: 128, microTokens: 2048 },
  ceilingBytes: 256 << 20,
};

const onGpu: Subject = {
  ...{ model: 'llama-1b', small: 'llama-125m', products: ['llama-1b'], rows: [8, 64, 512, 8192] },
  ...{ dtypes: ['bfloat16'], sequences: 4, length: 2048 },
  ...{ batches: [1, 8, 64], promptTokens: 128, newTokens: 128 },
  updated: 2 ** 28,
  rollout: { sequences: 64, promptTokens: 128, newTokens: 256, microTokens: 8192 },
  ceilingBytes: 2 ** 31,
};

/** Shows that the benches run; its times say nothing. */
const onEmulation: Subject = {
  ...{ model: 'tiny', small: 'tiny', products: ['tiny'], rows: [8] },
  ...{ dtypes: ['bfloat16', 'float32'], sequences: 2, length: 32 },
  ...{ batches: [1, 2], promptTokens: 8, newTokens: 4 },
  updated: 65_536,
  rollout: { sequences: 4, promptTokens: 8, newTokens: 4, microTokens: 64 },
  ceilingBytes: 1 << 18,
};

/** By a part of the name that the driver gives, the first that fits: TFLOP/s and GB/s of the vendor's data sheets. */
const dataSheets: readonly [name: string, flops: number, bytes: number][] = [
  ['H200 NVL', 835, 4800],
  ['H200', 989, 4800],
  ['H100 NVL', 835, 3938],
  ['H100 PCIe', 756, 2039],
  ['H100', 989, 3350],
  ['A100-SXM4-40GB', 312, 1555],
  ['A100-PCIE-40GB', 312, 1555],
  ['A100 80GB PCIe', 312, 1935],
  ['A100', 312, 2039],
  ['L40S', 362, 864],
  ['RTX 4090', 165, 1008],
  ['RTX 3090', 71, 936],
];

/** `gpu` is the driver's name of it. */
export function statedOf(gpu: string): Subject['stated'] {
  const sheet = dataSheets.find(([name]) => gpu.includes(name));
  return sheet && { flops: sheet[1] * 1e12, bytes: sheet[2] * 1e9 };
}

export function subject(): Subject {
  if (resolveProcessor('auto') === 'cpu') return onCpu;
  const { build, gpus } = loadNative().cuda();
  if (build === 'emulated') return onEmulation;
  const stated = statedOf(gpus[0]?.name ?? '');
  return stated ? { ...onGpu, stated } : onGpu;
}

/** One operation as a share of its ceiling, run by run in turn. */
export async function shareOfCeiling(device: Device, name: string, call: NativeBench): Promise<Measurement> {
  const { ceilingBytes, stated } = subject();
  const { value: result } = await device.native.bench({ ceilingBytes, ...call });
  if (!result.verified) throw new Error(`${name}: the result differs from the reference; nothing was measured`);
  const shares = result.seconds.map(
    (seconds, i) => result.work / seconds / (result.ceilingWork / (result.ceilingSeconds[i] ?? Number.NaN)),
  );
  const rate = result.work / spread(result.seconds).median;
  const inProducts = (call.what === 'gemm' && !call.cold) || call.what === 'attention';
  const peak = inProducts ? stated && stated.flops / 2 : stated?.bytes;
  const isOfPeak = peak !== undefined && !(inProducts && call.dtype === 'float32');
  return measured(name, shares, 'share of ceiling', {
    rate: round(rate),
    ceiling: round(result.ceilingWork / spread(result.ceilingSeconds).median),
    ...(isOfPeak ? { ofStated: round(rate / peak) } : {}),
  });
}

/** A ceiling of the device, in multiply-adds or bytes read, per second. */
export async function ceilingOf(
  device: Device,
  of: 'products' | 'memory',
  dtype: 'float32' | 'bfloat16',
): Promise<number> {
  const { value } = await device.native.bench({
    ...{ what: 'ceilings', runs: 3, dtype },
    ceilingBytes: subject().ceilingBytes,
  });
  return of === 'products'
    ? value.ceilingWork / spread(value.ceilingSeconds).median
    : value.work / spread(value.seconds).median;
}

const folders = [join(import.meta.dirname, 'shapes'), join(import.meta.dirname, '..', 'test', 'fixtures', 'configs')];

/** config.json of a shape. */
export function configOf(name: string): Record<string, unknown> {
  const path = folders.map((folder) => join(folder, name, 'config.json')).find((each) => existsSync(each));
  if (path === undefined) throw new Error(`there is no shape ${name} in ${folders.join(' or ')}`);
  return JSON.parse(readFileSync(path, 'utf8')) as Record<string, unknown>;
}

export function shapeOf(name: string, head: Head = 'language'): ModelShape {
  return withHead(parseModelConfig(configOf(name), name), head);
}

/** A deterministic stream of uniform numbers in [0, 1). */
export function uniform(seed: number): () => number {
  let state = seed >>> 0 || 1;
  return () => {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    return (state >>> 0) / 2 ** 32;
  };
}

export interface RandomModel {
  shape: ModelShape;
  device: Device;
  dtype: 'float32' | 'bfloat16';
  train?: boolean;
  parts?: number;
  seed?: number;
}

/** An engine with small random weights, norms at one. */
export async function randomEngine(options: RandomModel): Promise<NativeEngine> {
  const { shape, device, dtype, train = false, parts, seed = 1 } = options;
  const engine = new NativeEngine({ shape, device, dtype, train, ...(parts === undefined ? {} : { parts }) });
  await fillEngine(engine, engine.table, seed);
  return engine;
}

/** Small random weights, norms at one, for the checkpoint tensors of a table: each once, whatever ranks have of it. */
export async function fillEngine(engine: Engine, table: readonly TensorSpec[], seed = 1): Promise<void> {
  const random = uniform(seed);
  const sources = new Map(table.flatMap((tensor) => tensor.sources).map((source) => [source.name, source]));
  for (const { name, shape } of sources.values()) {
    const data = new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(1);
    if (shape.length > 1) {
      // What is larger repeats: drawing each of a billion numbers takes longer than what is measured.
      const drawn = Math.min(data.length, 16_000_057);
      for (let i = 0; i < drawn; i++) data[i] = (random() - 0.5) * 0.07;
      for (let i = drawn; i < data.length; i += drawn) data.copyWithin(i, 0, Math.min(drawn, data.length - i));
    }
    await engine.writeTensor(name, data);
  }
  await engine.publish();
}

/** A random model as a checkpoint that never ends a text by itself: every response has its full length. */
export async function writeModel(name: string, directory: string, head: Head, seed: number): Promise<void> {
  await using device = createDevice({ threads: 1, processor: 'cpu' });
  await using engine = await randomEngine({ shape: shapeOf(name, head), device, dtype: 'float32', seed });
  await saveModel(engine, directory, { configJson: { ...configOf(name), eos_token_id: null } });
}

export function randomTokens(count: number, vocabulary: number, seed = 2): Int32Array {
  const random = uniform(seed);
  return Int32Array.from({ length: count }, () => 3 + Math.floor(random() * (vocabulary - 3)));
}

export { createDevice };
