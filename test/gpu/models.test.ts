/**
 * Models on a GPU give the bits that they give on the CPU: scores, gradients, the update and generated texts, for every kind of
 * model among the fixtures; and on the GPU the bits of a row do not depend on what else is in the batch.
 */
import './device.js';
import { describe, expect, test } from 'vitest';
import { packBatch } from '../../src/data/batch.js';
import type { Device } from '../../src/engine/device.js';
import type { Dtype } from '../../src/engine/engine.js';
import { loadNative, type Processor } from '../../src/engine/native.js';
import type { NativeEngine } from '../../src/engine/native-engine.js';
import {
  type GpuCall,
  gpuArrayBytes,
  gpuGraphBytes,
  gpuPageBytes,
  gpuScratchBytes,
  gpuTableBytes,
} from '../../src/layout/gpu-plan.js';
import { gpuLogits, type LogitBlock, planTraining, wholeSequences } from '../../src/layout/memory-plan.js';
import { slow, testWhere } from '../conditions.js';
import {
  dtypes,
  fixtureModels,
  mostParts,
  randomModel,
  readAll,
  sameScores,
  sameTensors,
  scoreAlone,
  scoreTogether,
  sequencesOf,
  smallShape,
  type TestModel,
  tinyShape,
  withEngine,
} from '../native/support.js';
import { batchOf, gradientsOf, options } from '../native/training-support.js';
import { emulated, sameAsCpu } from './device.js';

const models = await fixtureModels();

async function trained(engine: NativeEngine, sequences: readonly Int32Array[]) {
  const outputs = ['logprobs', 'entropies'] as const;
  const cuts = [sequences.slice(0, 2), sequences.slice(2)].map((part) => packBatch(part));
  await engine.accumulate([cuts], { outputs, temperature: 0.9 }, gradientsOf);
  const gradients = await readAll(engine, 'gradients');
  const { gradientNorm } = await engine.step(options);
  return { gradients, gradientNorm, weights: await readAll(engine, 'weights') };
}

async function generated(engine: NativeEngine, prompts: readonly Int32Array[], maxNewTokens: number) {
  const requests = prompts.map((prompt, id) => ({ prompt, id }));
  const settings = { maxNewTokens, temperature: 0.8, topK: 20, topP: 0.9, seed: 3, stopTokens: [] };
  const results = await engine.generate(requests, settings);
  const greedy = { ...settings, temperature: 0, maxNewTokens: 2 * maxNewTokens };
  expect(await engine.generate(requests, { ...greedy, speculation: 3 })).toEqual(
    await engine.generate(requests, greedy),
  );
  return results.map(({ tokens, logprobs }) => ({ tokens: [...tokens], logprobs: [...logprobs] }));
}

async function everything(model: TestModel, dtype: Dtype, processor: Processor) {
  const parts = mostParts(model.shape);
  const sequences = sequencesOf(model.shape, [9, 1, 66, 12]);
  return withEngine(model, { dtype, parts, processor, train: true }, async (engine, device) => {
    expect(device.kernels === 'cuda').toBe(processor === 'cuda');
    const before = await scoreTogether(engine, sequences);
    sameScores(await scoreAlone(engine, sequences), before, 'alone and together');
    const prompts = sequences.map((tokens) => tokens.slice(0, 5));
    const results = { before, texts: await generated(engine, prompts, 6), ...(await trained(engine, sequences)) };
    if (emulated && processor === 'cuda') {
      const call = { rows: 120, sequences: 4, train: true, generates: true };
      const { taken, planned } = besideArenas(engine, device, call);
      expect(taken).toBeLessThanOrEqual(planned);
    }
    return results;
  });
}

/** Bytes of the GPU that are taken beside arenas, and the most that the plan has for them. */
function besideArenas(engine: NativeEngine, device: Device, call: GpuCall): { taken: number; planned: number } {
  const { freeBytes, totalBytes } = loadNative().gpuMemory(0);
  const { weights, gradients, optimizer } = engine.memory();
  const model = [weights!, gradients!, optimizer!].map(({ planned }) => planned);
  const workspace = model.reduce((rest, bytes) => rest - bytes, device.spaces().device.used);
  const pages = [...model, workspace].reduce((sum, bytes) => sum + Math.ceil(bytes / gpuPageBytes), 0);
  const { shape, parts, dtype } = engine;
  const share = { shape, parts, dtype };
  const queue = gpuScratchBytes(share, call) + gpuArrayBytes(share, call) + gpuGraphBytes(share, call);
  return { taken: totalBytes - freeBytes - pages * gpuPageBytes, planned: queue + gpuTableBytes(share, 1, call.train) };
}

const planTest = testWhere(emulated, 'the emulation counts what is taken of its GPUs');

describe.each(models)('$name', (model) => {
  for (const [i, dtype] of dtypes.entries()) {
    const run = models.indexOf(model) % 2 === i ? test : slow;
    run(`scores, learns and generates with the CPU's bits, ${dtype}`, async () => {
      const gpu = await everything(model, dtype, 'cuda');
      if (!sameAsCpu(dtype)) return;
      const cpu = await everything(model, dtype, 'cpu');
      sameScores(gpu.before, cpu.before, 'scores');
      sameTensors(gpu.gradients, cpu.gradients, 'gradients');
      expect(gpu.gradientNorm).toBe(cpu.gradientNorm);
      sameTensors(gpu.weights, cpu.weights, 'weights after a step');
      expect(gpu.texts).toEqual(cpu.texts);
    });
  }
});

describe('a block of logits', () => {
  const shape = { ...tinyShape, vocabulary: 600 };
  const lengths = [40, 3, 30];

  /** Also that the plan of the step is used to the last byte. */
  async function trainedWith(dtype: Dtype, processor: Processor, logits?: LogitBlock) {
    const device = { dtype, processor, train: true, ...(logits ? { logits } : {}) };
    return withEngine(randomModel('tiny', shape), device, async (engine, device) => {
      const outputs = ['logprobs', 'entropies'] as const;
      const forward = await engine.forward(batchOf(shape, lengths), { outputs, keep: true });
      await engine.backward(gradientsOf(forward));
      const size = wholeSequences(lengths, device.rowGrain);
      const place = { tensorRanks: 1, lastStage: true, logits: device.logits };
      const { total } = planTraining(shape, dtype, size, { place });
      const { planned, highWater } = engine.memory().workspace!;
      expect(planned).toBe(total);
      expect(total - highWater).toBeLessThan(64);
      return { forward, total, gradients: await readAll(engine, 'gradients') };
    });
  }

  test.each(dtypes)('changes no bit, and less memory is planned for a smaller one, %s', async (dtype) => {
    const whole = await trainedWith(dtype, 'cuda');
    const others = [await trainedWith(dtype, 'cuda', { rows: 16, bytes: 1 << 30 })];
    others.push(await trainedWith(dtype, 'cuda', { rows: 1 << 20, bytes: 200_000 }));
    for (const { total } of others) expect(total).toBeLessThan(whole.total);
    if (sameAsCpu(dtype)) others.push(await trainedWith(dtype, 'cpu', { rows: 16, bytes: 1 << 30 }));
    for (const { forward, gradients } of others) {
      expect(forward).toEqual(whole.forward);
      sameTensors(gradients, whole.gradients, 'gradients');
    }
  });

  test('of a large vocabulary is planned as large on a GPU as its products need, and near the caches on a CPU', () => {
    const large = { ...tinyShape, vocabulary: 128256 };
    const staging = (logits?: LogitBlock): number => {
      const place = { tensorRanks: 1, lastStage: true, ...(logits ? { logits } : {}) };
      const { names, bytes } = planTraining(large, 'bfloat16', { rows: 8192, pages: 128 }, { place });
      return bytes[names.indexOf('staging')]!;
    };
    expect(staging(gpuLogits)).toBe(1024 * 128256 * 6);
    expect(staging()).toBe(16 * 128256 * 6);
  });
});

describe.each(dtypes)('what many rows take beside arenas, %s', (dtype) => {
  planTest('is what is planned, but for the second region of index arrays', () =>
    withEngine(
      randomModel('one layer', { ...smallShape, layers: 1, windows: [0] }),
      { dtype, parts: 8, processor: 'cuda', train: true },
      async (engine, device) => {
        const lengths = [500, 100];
        const forward = await engine.forward(batchOf(engine.shape, lengths), { outputs: ['logprobs'], keep: true });
        await engine.backward(gradientsOf(forward));
        await engine.step(options);
        const { rows } = wholeSequences(lengths, device.rowGrain);
        const call = { rows, sequences: lengths.length, train: true, generates: false };
        const { taken, planned } = besideArenas(engine, device, call);
        expect(taken).toBeLessThanOrEqual(planned);
        expect(planned - taken).toBe(4 << 20);
      },
    ),
  );
});
