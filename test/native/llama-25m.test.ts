/** The shapes of a real model, eight parts: what small shapes are held to, scores, texts and a step over ranks, holds here too. */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect } from 'vitest';
import { checkpointTensors } from '../../src/checkpoints/hugging-face.js';
import type { Engine } from '../../src/engine/engine.js';
import { ParallelEngine } from '../../src/engine/parallel-engine.js';
import { parseModelConfig } from '../../src/layout/config.js';
import { slow } from '../conditions.js';
import { dtypes, randomModel, requestsOf, sameBits, sameGenerated, sampling, sequencesOf } from './support.js';
import { batchOf, gradientsOf, options, withDevices } from './training-support.js';

const fixtures = process.env.LOCKSTEP_FIXTURES ?? 'test/fixtures';
const path = join(fixtures, 'configs', 'llama-25m', 'config.json');
const shape = parseModelConfig(JSON.parse(readFileSync(path, 'utf8')), path);
const model = randomModel('llama-25m', shape);

async function results(engine: Engine) {
  const batch = batchOf(shape, [40, 9, 66]);
  const { logprobs, entropies } = await engine.forward(batch, { outputs: ['logprobs', 'entropies'] });
  const requests = requestsOf(sequencesOf(shape, [12, 70]));
  const texts = await engine.generate(requests, { ...sampling, maxNewTokens: 6 });
  await engine.accumulate([[batch]], { outputs: ['logprobs', 'entropies'] }, gradientsOf);
  const { gradientNorm } = await engine.step(options);
  const after = await engine.forward(batch, { outputs: ['logprobs'] });
  return { logprobs: logprobs!, entropies: entropies!, texts, gradientNorm, after: after.logprobs! };
}

for (const dtype of dtypes) {
  slow(`llama-25m over ranks gives the bits of one, ${dtype}`, async () => {
    await withDevices(1, async ([device]) => {
      const one = await model.open({ device: device!, dtype, parts: 8, train: true });
      const tensors = await Promise.all(
        checkpointTensors(one).map(async ({ name }) => [name, await one.readTensor(name)] as const),
      );
      const expected = await results(one);
      for (const degrees of [
        { pipeline: 1, tensor: 2 },
        { pipeline: 1, tensor: 8 },
        { pipeline: 3, tensor: 4 },
      ]) {
        await withDevices(degrees.pipeline * degrees.tensor, async (devices) => {
          const engine = await ParallelEngine.create({ shape, devices, degrees, dtype, parts: 8, train: true });
          for (const [name, data] of tensors) await engine.writeTensor(name, data);
          await engine.publish();
          const actual = await results(engine);
          const what = JSON.stringify(degrees);
          for (const name of ['logprobs', 'entropies', 'after'] as const) {
            sameBits(actual[name], expected[name], `${what}: ${name}`);
          }
          for (const [i, text] of expected.texts.entries()) sameGenerated(actual.texts[i]!, text, `${what}: text ${i}`);
          expect(actual.gradientNorm, what).toBe(expected.gradientNorm);
          await engine.close();
        });
      }
    });
  });
}
