/** Training over several GPUs and NCCL gives one GPU's bits, and the CPU's. */
import './device.js';
import { describe, expect, test } from 'vitest';
import { createDevice } from '../../src/checkpoints/load-model.js';
import type { Engine } from '../../src/engine/engine.js';
import { slow } from '../conditions.js';
import {
  generatedAsScored,
  randomModel,
  requestsOf,
  sameGenerated,
  sampling,
  sequencesOf,
  tinyShape,
} from '../native/support.js';
import { type Layout, layoutName, same, train, trainOver, withDevices } from '../native/training-support.js';
import { sameAsCpu } from './device.js';

const model = randomModel('tiny', { ...tinyShape, heads: 8, headWidth: 8, keyValueHeads: 4, feedForward: 128 });

const cpu = async (dtype: 'float32' | 'bfloat16') => {
  await using device = createDevice({ threads: 1, processor: 'cpu' });
  return await train(await model.open({ device, dtype, parts: 8, train: true }));
};

const layouts: Layout[] = [
  { tensor: 2 },
  { pipeline: 2 },
  { pipeline: 2, schedule: 'gpipe' },
  { pipeline: 2, tensor: 2 },
];

describe.each(['float32', 'bfloat16'] as const)('two steps in %s', (dtype) => {
  test("over one GPU give the CPU's bits", async () => {
    if (!sameAsCpu(dtype)) return;
    same(
      await withDevices(1, async ([device]) =>
        train(await model.open({ device: device!, dtype, parts: 8, train: true })),
      ),
      await cpu(dtype),
      'one GPU',
    );
  });
  for (const [i, layout] of layouts.entries()) {
    (i >= 2 && dtype === 'bfloat16' ? slow : test)(`over ${layoutName(layout)} give the bits of one GPU`, async () => {
      const one = await withDevices(1, async ([device]) =>
        train(await model.open({ device: device!, dtype, parts: 8, train: true })),
      );
      same(await trainOver(model, layout, dtype), one, layoutName(layout));
    });
  }
});

describe('replicas', () => {
  test.each([{ data: 2 }, { data: 2, zero: 1 }, { data: 2, zero: 2 }, { data: 2, zero: 3 }] as Layout[])(
    '%j give the bits that they give on the CPU',
    async (layout) => {
      const gpu = await trainOver(model, layout, 'float32');
      const before = process.env.LOCKSTEP_DEVICE;
      process.env.LOCKSTEP_DEVICE = 'cpu';
      try {
        same(gpu, await trainOver(model, layout, 'float32'), layoutName(layout));
      } finally {
        process.env.LOCKSTEP_DEVICE = before;
      }
    },
  );
});

describe('the 3D-HybridEngine', () => {
  /** A step, texts, and after them a step: the weights went to the generation layout and came back. */
  async function trainedAroundTexts(engine: Engine) {
    const before = await train(engine, 1);
    const prompts = sequencesOf(model.shape, [3, 17, 9]);
    const texts = await engine.generate(requestsOf(prompts), { ...sampling, maxNewTokens: 6 });
    await generatedAsScored(engine, prompts, texts, 1);
    return { before, texts, after: await train(engine, 1) };
  }

  test.each([
    ['bfloat16', { pipeline: 2, tensor: 2, generation: { pipeline: 1, tensor: 1 } }],
    ['float32', { tensor: 4, generation: { pipeline: 1, tensor: 2 }, transition: 'hybridflow-v' }],
  ] as const)(
    "generates over NCCL what the trainer scores, the CPU's texts, and trains on: %s, %j",
    async (dtype, layout) => {
      const ranks = await trainOver(model, layout, dtype, trainedAroundTexts);
      if (!sameAsCpu(dtype)) return;
      await using device = createDevice({ threads: 1, processor: 'cpu' });
      const one = await trainedAroundTexts(await model.open({ device, dtype, parts: 8, train: true }));
      same(ranks.before, one.before, 'before');
      expect(ranks.texts).toHaveLength(3);
      for (const [i, text] of ranks.texts.entries()) sameGenerated(text, one.texts[i]!, `text ${i}`);
      same(ranks.after, one.after, 'after');
    },
  );
});
