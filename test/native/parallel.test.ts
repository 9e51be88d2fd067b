/**
 * A model over tensor- and pipeline-parallel ranks gives the bits of one rank at equal parts (DESIGN §2), holds what the plan
 * says, and a rank that fails or is closed takes no other with it into a wait.
 */
import { describe, expect, test } from 'vitest';
import { checkpointTensors, openCheckpoint } from '../../src/checkpoints/hugging-face.js';
import { createDevice, createEngine, createParallelEngine } from '../../src/checkpoints/load-model.js';
import { packBatch } from '../../src/data/batch.js';
import type { Device } from '../../src/engine/device.js';
import type { Engine, ForwardOutput, ForwardResult, Generated } from '../../src/engine/engine.js';
import type { NativeEngine } from '../../src/engine/native-engine.js';
import { ParallelEngine } from '../../src/engine/parallel-engine.js';
import { together } from '../../src/engine/together.js';
import { planGeneration } from '../../src/layout/memory-plan.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { goldenDirectories } from './golden.js';
import {
  built,
  childPrelude,
  dtypes,
  mostParts,
  random,
  randomModel,
  readAll,
  requestsOf,
  runModule,
  sameBits,
  sameGenerated,
  sameTensors,
  sampling,
  sequencesOf,
  smallShape,
  type TestModel,
  tinyShape,
} from './support.js';

interface Layout {
  pipeline: number;
  tensor: number;
}

const layoutName = ({ pipeline, tensor }: Layout): string => `p${pipeline} t${tensor}`;

async function withDevices<T>(count: number, run: (devices: Device[]) => Promise<T>): Promise<T> {
  const devices = Array.from({ length: count }, () => createDevice({ threads: 1 }));
  try {
    return await run(devices);
  } finally {
    for (const device of devices) await device.close();
  }
}

/** The same weights over ranks. */
async function spread(one: NativeEngine, devices: Device[], degrees: Layout): Promise<ParallelEngine> {
  const { shape, dtype, parts } = one;
  const engine = await ParallelEngine.create({ shape, devices, degrees, dtype, parts, timeoutSeconds: 20 });
  for (const { name } of checkpointTensors(one)) await engine.writeTensor(name, await one.readTensor(name));
  await engine.publish();
  return engine;
}

const outputsOf = (shape: ModelShape): ForwardOutput[] =>
  shape.head === 'language' ? ['logprobs', 'entropies', 'logits', 'hidden'] : ['values', 'hidden'];

function forwardAll(engine: Engine): Promise<ForwardResult[]> {
  const batches = [[33, 1, 2, 17], [70], [5, 5]].map((lengths) => packBatch(sequencesOf(engine.shape, lengths)));
  return engine.forwardEach(batches, { outputs: outputsOf(engine.shape), temperature: 0.8 });
}

function sameResults(actual: readonly ForwardResult[], expected: readonly ForwardResult[], what: string): void {
  for (const [i, result] of expected.entries()) {
    for (const [name, numbers] of Object.entries(result) as [ForwardOutput, Float32Array][]) {
      sameBits(actual[i]![name]!, numbers, `${what}: ${name} of batch ${i}`);
    }
  }
}

/** Prompts shared, short, and longer than a page; two ways of sampling; stop tokens. */
async function generateAll(engine: Engine): Promise<Generated[]> {
  const { vocabulary, maxPositions } = engine.shape;
  const longest = Math.min(90, maxPositions - 20);
  const prompts = sequencesOf(engine.shape, [3, 17, longest, 1]);
  const requests = requestsOf([...prompts, prompts[2]!, prompts[1]!]);
  const sampled = { ...sampling, maxNewTokens: 16, stopTokens: [Math.floor(vocabulary / 3)] };
  const greedy = { ...sampled, temperature: 0 };
  const few = requests.slice(0, 2);
  const plain = await engine.generate(few, greedy);
  sameTexts(await engine.generate(few, { ...greedy, speculation: 3 }), plain, 'with guesses');
  return [
    ...(await engine.generate(requests, sampled)),
    ...(await engine.generate(requests, { ...sampled, temperature: 0.7, topP: 0.9, topK: 12 })),
    ...plain,
  ];
}

function sameTexts(actual: readonly Generated[], expected: readonly Generated[], what: string): void {
  expect(actual.length).toBe(expected.length);
  for (const [i, text] of expected.entries()) sameGenerated(actual[i]!, text, `${what}: text ${i}`);
}

/** Every power of two up to the parts, every number of stages up to 3, but not one rank. */
function layoutsOf(shape: ModelShape, parts: number): Layout[] {
  const layouts: Layout[] = [];
  for (let pipeline = 1; pipeline <= Math.min(3, shape.layers); pipeline++) {
    for (let tensor = 1; tensor <= parts; tensor *= 2) {
      if (pipeline * tensor > 1) layouts.push({ pipeline, tensor });
    }
  }
  return layouts;
}

const folders = goldenDirectories();

describe.each(folders)('$name over ranks', ({ directory }) => {
  test.each(dtypes)('reads its parts of the files, scores and generates as one rank does, %s', async (dtype) => {
    const checkpoint = await openCheckpoint(directory);
    const parts = mostParts(checkpoint.shape);
    const expected = await withDevices(1, async ([device]) => {
      const one = await createEngine({ model: checkpoint, device: device!, dtype, parts });
      const results = await forwardAll(one);
      const texts = checkpoint.shape.head === 'language' ? await generateAll(one) : [];
      return { results, texts, tensors: await readAll(one, 'weights') };
    });
    for (const degrees of layoutsOf(checkpoint.shape, parts)) {
      await withDevices(degrees.pipeline * degrees.tensor, async (devices) => {
        const engine = await createParallelEngine({ model: checkpoint, devices, degrees, dtype, parts });
        sameResults(await forwardAll(engine), expected.results, layoutName(degrees));
        if (expected.texts.length > 0) sameTexts(await generateAll(engine), expected.texts, layoutName(degrees));
        sameTensors(await readAll(engine, 'weights'), expected.tensors, layoutName(degrees));
      });
    }
  });
});

const gpt2Shape: ModelShape = {
  ...tinyShape,
  ...{ family: 'gpt2', heads: 8, keyValueHeads: 8, headWidth: 8, feedForward: 256, windows: [0, 0], tied: true },
  ...{ norm: 'layer', activation: 'gelu-tanh', qkvBias: true, outputBias: true, mlpBias: true },
  positions: { type: 'learned' },
  maxPositions: 128,
};
const shapes: Record<string, ModelShape> = {
  'key/value heads on two ranks each': smallShape,
  'one key/value head, tied, a vocabulary that leaves a rank nothing': {
    ...{ ...tinyShape, heads: 8, headWidth: 8, keyValueHeads: 1, feedForward: 128, tied: true, vocabulary: 20 },
  },
  'biases and learned positions': gpt2Shape,
  'head norms and a value head': {
    ...{ ...tinyShape, family: 'qwen3', heads: 8, headWidth: 8, keyValueHeads: 2, feedForward: 128 },
    ...{ headNorm: true, head: 'value', headBias: true },
  },
};
const models: TestModel[] = Object.entries(shapes).map(([name, shape]) => randomModel(name, shape));

describe.each(models)('eight parts: $name', (model) => {
  test.each(dtypes)('log-probs, entropies, logits, values and texts of one rank, %s', async (dtype) => {
    await withDevices(1, async ([device]) => {
      const one = await model.open({ device: device!, dtype, parts: 8 });
      const language = model.shape.head === 'language';
      const expected = await forwardAll(one);
      const texts = language ? await generateAll(one) : [];
      const deep = { pipeline: model.shape.layers, tensor: 4 };
      for (const degrees of [2, 4, 8].map((tensor) => ({ pipeline: 1, tensor })).concat(deep)) {
        await withDevices(degrees.pipeline * degrees.tensor, async (devices) => {
          const engine = await spread(one, devices, degrees);
          sameResults(await forwardAll(engine), expected, layoutName(degrees));
          if (language) sameTexts(await generateAll(engine), texts, layoutName(degrees));
        });
      }
    });
  });
});

describe('generation over ranks', () => {
  const shape = { ...smallShape, maxPositions: 400 };
  const model = randomModel('small', shape);
  const requests = requestsOf(sequencesOf(shape, [40, 3, 70, 12]));
  const long = { ...sampling, maxNewTokens: 300 };

  const withRanks = (degrees: Layout, run: (engine: ParallelEngine, one: NativeEngine) => Promise<void>) =>
    withDevices(1, async ([device]) => {
      const one = await model.open({ device: device!, dtype: 'float32', parts: 8 });
      await withDevices(degrees.pipeline * degrees.tensor, async (devices) =>
        run(await spread(one, devices, degrees), one),
      );
    });

  test('ends the requests that the callback ends, on all ranks', async () => {
    await withRanks({ pipeline: 2, tensor: 2 }, async (engine, one) => {
      const expected = await one.generate(requests, long);
      const onProgress = () => [1];
      const actual = await engine.generate(requests, { ...long, onProgress });
      const [ended] = actual.splice(1, 1);
      const [whole] = expected.splice(1, 1);
      expect(ended!.finish).toBe('aborted');
      expect(ended!.tokens.length).toBeLessThan(300);
      sameBits(ended!.tokens, whole!.tokens.subarray(0, ended!.tokens.length), 'what there was at its end');
      sameTexts(actual, expected, 'the others');
    });
  });

  test('an abort and a callback that throws end it, and the ranks go on', async () => {
    await withRanks({ pipeline: 3, tensor: 1 }, async (engine, one) => {
      const controller = new AbortController();
      const onProgress = () => void controller.abort();
      const aborted = engine.generate(requests, { ...long, onProgress, signal: controller.signal });
      await expect(aborted).rejects.toMatchObject({ name: 'AbortError' });
      const thrown = engine.generate(requests, {
        ...long,
        onProgress: () => {
          throw new Error('no more');
        },
      });
      await expect(thrown).rejects.toThrow('no more');
      const few = { ...sampling, maxNewTokens: 5 };
      sameTexts(await engine.generate(requests, few), await one.generate(requests, few), 'afterwards');
    });
  });

  test('pages that run out on one rank give the same texts', async () => {
    const degrees = { pipeline: 2, tensor: 1 };
    await withDevices(1, async ([device]) => {
      const one = await model.open({ device: device!, dtype: 'float32', parts: 8 });
      const expected = await one.generate(requests, long);
      const budgets = await withDevices(2, async (devices) => {
        const { ranks } = await spread(one, devices, degrees);
        return ranks.map(({ share, dtype }, i) => {
          const size = { rows: 125, sequences: requests.length, pages: i === 0 ? 9 : 30 };
          return devices[i]!.heldBytes + planGeneration(share.shape, dtype, size, share).total;
        });
      });
      const devices = budgets.map((memoryBytes) => createDevice({ threads: 1, memoryBytes, poison: true }));
      try {
        const engine = await spread(one, devices, degrees);
        sameTexts(await engine.generate(requests, long), expected, 'nine pages');
        const statistics = engine.ranks.map((rank) => rank.lastGeneration);
        expect(statistics[1]!.preemptions).toBeGreaterThan(0);
        await expect(engine.generate([{ id: 0, prompt: new Int32Array(401) }], long)).rejects.toMatchObject({
          code: 'PROMPT_TOO_LONG',
        });
        await expect(engine.generate([{ id: 0, prompt: Int32Array.of(1000) }], long)).rejects.toMatchObject({
          code: 'TOKEN_OUT_OF_RANGE',
        });
        expect(await engine.generate(requests.slice(0, 1), { ...long, maxNewTokens: 2 })).toHaveLength(1);
      } finally {
        for (const owned of devices) await owned.close();
      }
    });
  });
});

describe('memory of a rank', () => {
  const sameMemory = (engine: ParallelEngine): void => {
    for (const [arena, { planned, highWater }] of Object.entries(engine.memory())) {
      if (!arena.endsWith('scratch')) expect(highWater, arena).toBe(planned);
    }
  };

  test.each(dtypes)('is what was planned, %s', async (dtype) => {
    await withDevices(6, async (devices) => {
      const degrees = { pipeline: 3, tensor: 2 };
      const engine = await ParallelEngine.create({ shape: smallShape, devices, degrees, dtype, parts: 8 });
      await engine.forward(packBatch(sequencesOf(smallShape, [90, 33])), { outputs: ['logprobs'] });
      sameMemory(engine);
      await engine.generate(requestsOf(sequencesOf(smallShape, [300, 100])), { ...sampling, maxNewTokens: 4 });
      sameMemory(engine);
    });
  });
});

describe('what cannot be is refused', () => {
  const create = (degrees: Layout, ranks = degrees.pipeline * degrees.tensor) =>
    withDevices(ranks, (devices) =>
      ParallelEngine.create({ shape: smallShape, devices, degrees, dtype: 'float32', parts: 4 }),
    );

  test.each([
    [{ pipeline: 1, tensor: 8 }, 'PARALLEL_INVALID'],
    [{ pipeline: 1, tensor: 3 }, 'PARALLEL_INVALID'],
    [{ pipeline: 4, tensor: 1 }, 'PARALLEL_INVALID'],
  ])('%j: %s', async (degrees, code) => {
    await expect(create(degrees)).rejects.toMatchObject({ code });
  });

  test('a number of devices that is not that of ranks', async () => {
    await expect(create({ pipeline: 1, tensor: 2 }, 3)).rejects.toMatchObject({ code: 'RANKS_INVALID' });
  });

  test('a bad batch, before any rank starts: the next call works', async () => {
    await withDevices(2, async (devices) => {
      const degrees = { pipeline: 2, tensor: 1 };
      const engine = await ParallelEngine.create({ shape: tinyShape, devices, degrees, dtype: 'float32' });
      const forward = (tokens: number[], lengths: number[]) =>
        engine.forward(
          { tokens: Int32Array.from(tokens), lengths: Int32Array.from(lengths) },
          { outputs: ['logprobs'] },
        );
      await expect(forward([1, 97], [2])).rejects.toMatchObject({ code: 'TOKEN_OUT_OF_RANGE' });
      await expect(forward([], [0])).rejects.toMatchObject({ code: 'SEQUENCE_TOO_LONG' });
      expect((await forward([1, 2], [2])).logprobs).toHaveLength(2);
    });
  });
});

describe('a rank that fails', () => {
  const common = { dtype: 'float32', parts: 4, timeoutSeconds: 5 } as const;
  const seconds = async (run: () => Promise<unknown>): Promise<number> => {
    const start = performance.now();
    await run();
    return (performance.now() - start) / 1000;
  };

  test.each([0, 1, 2, 3])('rank %d: all calls end with its error, and close', async (bad) => {
    const spent = await seconds(() =>
      withDevices(4, async (devices) => {
        const degrees = { pipeline: 2, tensor: 2 };
        const engine = await ParallelEngine.create({ ...common, shape: smallShape, devices, degrees });
        const batch = packBatch(sequencesOf(smallShape, [40, 9]));
        const calls = engine.ranks.map((rank) => rank.planForward([batch], { outputs: ['logprobs'] }));
        const tokens = Int32Array.from(batch.tokens).fill(5000, 3, 4);
        calls[bad]!.passes[0]!.tokens = tokens;
        const running = engine.ranks.map((rank, i) => rank.runForward(calls[i]!));
        await expect(together(running)).rejects.toMatchObject({ code: 'TOKEN_OUT_OF_RANGE' });
        for (const call of running) await expect(call).rejects.toThrow(/5000/);
        await expect(engine.forward(batch, { outputs: ['logprobs'] })).rejects.toMatchObject({ code: 'RANK_ABORTED' });
        await engine.close();
      }),
    );
    expect(spent).toBeLessThan(3);
  });

  test('a device closed in the middle of a call ends it for all', async () => {
    const layers = 24;
    const shape = { ...smallShape, layers, windows: new Array<number>(layers).fill(0) };
    const next = random(3);
    for (const degrees of [
      { pipeline: 1, tensor: 4 },
      { pipeline: 4, tensor: 1 },
    ]) {
      await withDevices(4, async (devices) => {
        const engine = await ParallelEngine.create({ ...common, shape, devices, degrees });
        const batch = packBatch(sequencesOf(shape, new Array<number>(8).fill(1000)));
        const running = engine.forward(batch, { outputs: ['logprobs'] });
        const ended = running.then(
          () => 'finished',
          (error: { code: string }) => error.code,
        );
        await new Promise((resolve) => setTimeout(resolve, 30 + 100 * next()));
        const spent = await seconds(() => devices[Math.floor(next() * 4)]!.close());
        expect(['RANK_ABORTED', 'ABORTED']).toContain(await ended);
        expect(spent).toBeLessThan(2);
        await expect(engine.forward(batch, { outputs: ['logprobs'] })).rejects.toThrow();
      });
    }
  });

  test('a device closed while its rank waits for one that does not come', async () => {
    await withDevices(2, async (devices) => {
      const degrees = { pipeline: 1, tensor: 2 };
      const engine = await ParallelEngine.create({ ...common, shape: smallShape, devices, degrees });
      const [call] = engine.ranks.map((rank) =>
        rank.planForward([packBatch(sequencesOf(smallShape, [9]))], { outputs: ['logprobs'] }),
      );
      const waiting = expect(engine.ranks[0]!.runForward(call!)).rejects.toMatchObject({ code: 'RANK_ABORTED' });
      await new Promise((resolve) => setTimeout(resolve, 50));
      expect(await seconds(() => devices[0]!.close())).toBeLessThan(2);
      await waiting;
    });
  });

  test('a process that ends in the middle of a call ends quietly', async () => {
    const ended = await runModule(`${childPrelude({ ...smallShape, layers: 12, windows: new Array(12).fill(0) })}
      const { ParallelEngine } = await import(${built('engine/parallel-engine.js')});
      const devices = Array.from({ length: 4 }, () => createDevice({ threads: 1 }));
      const degrees = { pipeline: 2, tensor: 2 };
      const engine = await ParallelEngine.create({ shape, devices, degrees, dtype: 'float32', parts: 4 });
      forward(engine, [1000, 1000, 1000, 1000, 1000]).catch(() => {});
      setTimeout(() => { console.log('leaving'); process.exit(0); }, 60);`);
    expect(ended).toMatchObject({ code: 0, signal: null, stdout: 'leaving\n', stderr: '' });
  });
});
