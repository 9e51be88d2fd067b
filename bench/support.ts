/** What the benches share: medians with spread, devices, and random models of the shapes in test/fixtures/configs. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { saveModel } from '../src/checkpoints/hugging-face.js';
import { createDevice } from '../src/checkpoints/load-model.js';
import type { Measurement } from '../src/cli/bench.js';
import type { Device } from '../src/engine/device.js';
import type { Engine } from '../src/engine/engine.js';
import type { NativeBench } from '../src/engine/native.js';
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

/** One operation as a share of its ceiling, run by run in turn. */
export async function shareOfCeiling(device: Device, name: string, call: NativeBench): Promise<Measurement> {
  const { value: result } = await device.native.bench(call);
  if (!result.verified) throw new Error(`${name}: the result differs from the reference; nothing was measured`);
  const share = spread(
    result.seconds.map(
      (seconds, i) => result.work / seconds / (result.ceilingWork / (result.ceilingSeconds[i] ?? Number.NaN)),
    ),
  );
  return {
    name,
    value: round(share.median),
    unit: 'share of ceiling',
    min: round(share.min),
    max: round(share.max),
    rate: round(result.work / spread(result.seconds).median),
    ceiling: round(result.ceilingWork / spread(result.ceilingSeconds).median),
  };
}

const configs = join(import.meta.dirname, '..', 'test', 'fixtures', 'configs');

/** config.json of a shape. */
export function configOf(name: string): Record<string, unknown> {
  return JSON.parse(readFileSync(join(configs, name, 'config.json'), 'utf8')) as Record<string, unknown>;
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
    const data = new Float32Array(shape.reduce((a, b) => a * b, 1));
    for (let i = 0; i < data.length; i++) data[i] = shape.length > 1 ? (random() - 0.5) * 0.07 : 1;
    await engine.writeTensor(name, data);
  }
  await engine.publish();
}

/** A random model as a checkpoint that never ends a text by itself: every response has its full length. */
export async function writeModel(name: string, directory: string, head: Head, seed: number): Promise<void> {
  await using device = createDevice({ threads: 1 });
  await using engine = await randomEngine({ shape: shapeOf(name, head), device, dtype: 'float32', seed });
  await saveModel(engine, directory, { configJson: { ...configOf(name), eos_token_id: null } });
}

export function randomTokens(count: number, vocabulary: number, seed = 2): Int32Array {
  const random = uniform(seed);
  return Int32Array.from({ length: count }, () => 3 + Math.floor(random() * (vocabulary - 3)));
}

export { createDevice };
