/**
 * Models on a GPU give the bits that they give on the CPU: scores, gradients, the update and generated texts, for every kind of
 * model among the fixtures; and on the GPU the bits of a row do not depend on what else is in the batch.
 */
import './device.js';
import { describe, expect, test } from 'vitest';
import { packBatch } from '../../src/data/batch.js';
import type { Dtype } from '../../src/engine/engine.js';
import type { Processor } from '../../src/engine/native.js';
import type { NativeEngine } from '../../src/engine/native-engine.js';
import { slow } from '../conditions.js';
import {
  dtypes,
  fixtureModels,
  mostParts,
  readAll,
  sameScores,
  sameTensors,
  scoreAlone,
  scoreTogether,
  sequencesOf,
  type TestModel,
  withEngine,
} from '../native/support.js';
import { gradientsOf, options } from '../native/training-support.js';
import { sameAsCpu } from './device.js';

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
    return { before, texts: await generated(engine, prompts, 6), ...(await trained(engine, sequences)) };
  });
}

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
