/** Checkpoints through the engine: what is loaded is what lies in the files, what is saved loads again, for every model fixture. */
import { cpSync, readFileSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { type Checkpoint, checkpointTensors, openCheckpoint, saveModel } from '../../src/checkpoints/hugging-face.js';
import { createDevice, createEngine } from '../../src/checkpoints/load-model.js';
import type { StoredTensor } from '../../src/checkpoints/safetensors.js';
import { loadOptimizerState, saveOptimizerState } from '../../src/checkpoints/state.js';
import { packBatch } from '../../src/data/batch.js';
import type { Device } from '../../src/engine/device.js';
import type { Engine, ForwardOutput, ParameterSpace } from '../../src/engine/engine.js';
import { resolveParts } from '../../src/layout/parts.js';
import { goldenDirectories } from './golden.js';
import { temporaryDirectory } from './support.js';

let device: Device;
beforeAll(() => {
  device = createDevice({ threads: 2 });
});
afterAll(() => device.close());

/** The bits of stored elements, widened to float32. */
function widened({ file, dtype, offset, bytes }: StoredTensor): Float32Array {
  const data = readFileSync(file);
  const view = new DataView(data.buffer, data.byteOffset + offset, bytes);
  const read: Record<string, [number, (at: number) => number]> = {
    F32: [4, (at) => view.getFloat32(at, true)],
    BF16: [2, (at) => new Float32Array(Uint32Array.of(view.getUint16(at, true) << 16).buffer)[0]!],
    F16: [2, (at) => halfToNumber(view.getUint16(at, true))],
  };
  const [size, element] = read[dtype]!;
  return Float32Array.from({ length: bytes / size }, (_, i) => element(i * size));
}

function halfToNumber(half: number): number {
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  const magnitude = exponent === 0 ? fraction * 2 ** -24 : (1 + fraction / 1024) * 2 ** (exponent - 15);
  return half & 0x8000 ? -magnitude : magnitude;
}

async function parametersOf(engine: Engine, space: ParameterSpace = 'weights'): Promise<Map<string, Float32Array>> {
  const parameters = new Map<string, Float32Array>();
  for (const { name } of checkpointTensors(engine)) parameters.set(name, await engine.readTensor(name, space));
  return parameters;
}

/** Equality of bits; element-wise comparison by the test runner takes seconds per model. */
function expectSameBits(actual: Float32Array, expected: Float32Array, what: string): void {
  const bytes = (data: Float32Array) => Buffer.from(data.buffer, data.byteOffset, data.byteLength);
  expect(actual.length, what).toBe(expected.length);
  expect(bytes(actual).equals(bytes(expected)), what).toBe(true);
}

async function expectSameParameters(a: Engine, b: Engine, space: ParameterSpace = 'weights'): Promise<void> {
  const expected = await parametersOf(b, space);
  for (const [name, data] of await parametersOf(a, space))
    expectSameBits(data, expected.get(name)!, `${space} ${name}`);
}

const tokens = [5, 9, 17, 3, 250, 12, 8, 77, 31];
const settings = { learningRate: 1e-3, betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1 } as const;

/** One update from a fixed gradient; the outputs before it. */
async function learn(engine: Engine, step: number): Promise<Float32Array> {
  const output: ForwardOutput & ('logprobs' | 'values') = engine.shape.head === 'language' ? 'logprobs' : 'values';
  const result = await engine.forward(packBatch([Int32Array.from(tokens)]), { outputs: [output], keep: true });
  await engine.backward({ [output]: Float32Array.from(tokens, (_, t) => Math.sin(t + step)) });
  await engine.step({ ...settings, step });
  return result[output]!;
}

describe.each(goldenDirectories())('$name', ({ directory }) => {
  test('loads exactly what the files hold, under any number of parts', async () => {
    const checkpoint: Checkpoint = await openCheckpoint(directory);
    const parts = [1, 2, 4].filter((count) => {
      try {
        return resolveParts(checkpoint.shape, count) === count;
      } catch {
        return false;
      }
    });
    for (const count of parts) {
      await using engine = await createEngine({ model: checkpoint, device, dtype: 'float32', parts: count });
      for (const [name, data] of await parametersOf(engine)) {
        expectSameBits(data, widened(checkpoint.tensors.get(name)!), `${name}, ${count} parts`);
      }
    }
  });

  test.each(['float32', 'bfloat16'] as const)(
    'save and load in %s = never stopped: weights, moments and the next update',
    async (dtype) => {
      const saved = temporaryDirectory();
      const { config } = await openCheckpoint(directory);
      await using engine = await createEngine({ model: directory, device, dtype, train: true });
      for (let step = 1; step <= 2; step++) await learn(engine, step);
      await saveModel(engine, saved, { configJson: config, maxShardBytes: 100_000 });
      await saveOptimizerState(engine, join(saved, 'trainer'));

      await using resumed = await createEngine({ model: saved, device, dtype, train: true });
      await loadOptimizerState(resumed, join(saved, 'trainer'));
      for (const space of ['weights', 'moment1', 'moment2'] as const) {
        await expectSameParameters(resumed, engine, space);
      }
      expectSameBits(await learn(resumed, 3), await learn(engine, 3), 'outputs');
      await expectSameParameters(resumed, engine);
    },
  );

  test('a new value head starts at zero on the same trunk', async () => {
    const checkpoint = await openCheckpoint(directory);
    await using engine = await createEngine({ model: checkpoint, device, dtype: 'float32', head: 'value' });
    const isNew = checkpoint.shape.head === 'language';
    for (const [name, data] of await parametersOf(engine)) {
      const stored = checkpoint.tensors.get(name);
      if (stored) expectSameBits(data, widened(stored), name);
      else
        expect(
          data.every((x) => x === 0),
          name,
        ).toBe(isNew || name.endsWith('bias'));
    }
  });

  test.each([
    ['NaN', Number.NaN],
    ['infinity', Number.POSITIVE_INFINITY],
  ])('%s in a weight is CHECKPOINT_NOT_FINITE, naming file and tensor', async (_, poison) => {
    const damaged = temporaryDirectory();
    cpSync(directory, damaged, { recursive: true });
    const [name, tensor] = [...(await openCheckpoint(damaged)).tensors].at(-1)!;
    const data = readFileSync(tensor.file);
    const at = tensor.offset + tensor.bytes - (tensor.dtype === 'F32' ? 4 : 2);
    if (tensor.dtype === 'F32') data.writeFloatLE(poison, at);
    else
      data.writeUInt16LE(
        tensor.dtype === 'BF16' ? (Number.isNaN(poison) ? 0x7fc0 : 0x7f80) : Number.isNaN(poison) ? 0x7e00 : 0x7c00,
        at,
      );
    writeFileSync(tensor.file, data);
    const error = await createEngine({ model: damaged, device, dtype: 'float32' }).catch((caught: unknown) => caught);
    expect(error).toMatchObject({ code: 'CHECKPOINT_NOT_FINITE', message: expect.stringContaining(name) });
    expect((error as Error).message).toContain(basename(tensor.file));
  });
});
