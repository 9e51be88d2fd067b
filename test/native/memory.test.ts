/**
 * Memory is what the plan says (DESIGN §1.5): planned bytes of every arena equal its high-water mark after the largest call,
 * what does not fit is refused with the arithmetic, and a training process holds what was planned and little else.
 */
import { describe, expect, test } from 'vitest';
import { packBatch } from '../../src/data/batch.js';
import { LockstepError } from '../../src/errors.js';
import { planGeneration, planModel, planScoring, planTraining, wholeSequences } from '../../src/layout/memory-plan.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import {
  built,
  childPrelude,
  dtypes,
  fixtureModels,
  randomModel,
  requestsOf,
  runModule,
  sampling,
  scoreTogether,
  sequencesOf,
  smallShape,
  tinyShape,
  withEngine,
} from './support.js';

const models = [...(await fixtureModels()), randomModel('small', smallShape)];
const step = { learningRate: 1e-3, betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1, step: 1 } as const;
const cases = models.flatMap((model) => dtypes.map((dtype) => ({ name: `${model.name} ${dtype}`, model, dtype })));

/** All of an arena is used, but for the alignment behind the last tensor. */
function expectFull(arena: { planned: number; highWater: number } | undefined, planned: number): void {
  expect(arena!.planned).toBe(planned);
  expect(planned - arena!.highWater).toBeGreaterThanOrEqual(0);
  expect(planned - arena!.highWater).toBeLessThan(64);
}

/** All of it is used, and it is the total of the plan but for the alignment behind the last buffer. */
function expectWorkspace(workspace: { planned: number; highWater: number }, total: number): void {
  expect(workspace.highWater).toBe(workspace.planned);
  expect(total - workspace.planned).toBeGreaterThanOrEqual(0);
  expect(total - workspace.planned).toBeLessThan(64);
}

describe.each(cases)('the plan of $name is used to the last byte', ({ model, dtype }) => {
  const sequences = sequencesOf(model.shape, [64, 31, 65, 8]);
  const size = wholeSequences(sequences.map(({ length }) => length));

  test.each([false, true])('by a training step, recompute %s', (recompute) =>
    withEngine(model, { dtype, train: true, recompute }, async (engine, device) => {
      const { logprobs } = await engine.forward(packBatch(sequences), { outputs: ['logprobs'], keep: true });
      await engine.backward({ logprobs: logprobs! });
      await engine.step(step);
      const memory = engine.memory();
      const plan = planModel(engine.table, dtype, true);
      expectFull(memory.weights, plan.weightsBytes);
      expectFull(memory.gradients, plan.gradientBytes);
      expectFull(memory.optimizer, plan.optimizerBytes);
      expect(device.heldBytes).toBe(plan.weightsBytes + plan.gradientBytes + plan.optimizerBytes);
      expectWorkspace(memory.workspace!, planTraining(model.shape, dtype, size, { recompute }).total);
      expect(memory.scratch!.highWater).toBeGreaterThan(0);
      expect(memory.scratch!.highWater).toBeLessThanOrEqual(memory.scratch!.planned);
    }),
  );

  test('by scoring', () =>
    withEngine(model, { dtype }, async (engine) => {
      await scoreTogether(engine, sequences);
      const memory = engine.memory();
      expectFull(memory.weights, planModel(engine.table, dtype, false).weightsBytes);
      expect(memory.gradients).toEqual({ planned: 0, highWater: 0 });
      expect(memory.optimizer).toEqual({ planned: 0, highWater: 0 });
      expectWorkspace(memory.workspace!, planScoring(model.shape, dtype, size).total);
    }));

  test('by generation', () =>
    withEngine(model, { dtype }, async (engine) => {
      await engine.generate(requestsOf(sequences), { ...sampling, maxNewTokens: 4 });
      const rows = sequences.reduce((sum, { length }) => sum + length, 0);
      const pages = sequences.reduce((sum, { length }) => sum + Math.ceil((length + 4) / 64) + 1, 0);
      const plan = planGeneration(model.shape, dtype, { rows, sequences: sequences.length, pages });
      expectWorkspace(engine.memory().workspace!, plan.total);
    }));
});

test('the workspace has the size of the largest call, and models use it in turn', () =>
  withEngine(randomModel('tiny', tinyShape), { dtype: 'float32', train: true }, async (engine, device) => {
    const [long, short] = sequencesOf(tinyShape, [300, 5]);
    const planned = async (sequence: Int32Array) => {
      await scoreTogether(engine, [sequence]);
      return engine.memory().workspace!.planned;
    };
    const first = await planned(short!);
    const largest = await planned(long!);
    expect(largest).toBeGreaterThan(first);
    expect(await planned(short!)).toBe(largest);

    const other = await randomModel('other', tinyShape, 2).open({ device, dtype: 'float32' });
    await scoreTogether(engine, [long!], { keep: true });
    await scoreTogether(other, [short!]);
    await expect(engine.backward({ logprobs: new Float32Array(300) })).rejects.toMatchObject({ code: 'NO_FORWARD' });
    const held = device.heldBytes;
    await other.close();
    expect(device.heldBytes).toBeLessThan(held);
  }));

describe('what does not fit is refused', () => {
  const model = randomModel('tiny', tinyShape);

  async function budgetError(promise: Promise<unknown>): Promise<LockstepError> {
    const error = await promise.then(
      () => undefined,
      (reason: unknown) => reason,
    );
    if (!LockstepError.isInstance(error)) throw new Error(`expected a LockstepError, received ${error}`);
    expect(error.code).toBe('MEMORY_BUDGET');
    const { bytes, held, budget } = error.details as { bytes: number; held: number; budget: number };
    expect(held + bytes).toBeGreaterThan(budget);
    for (const amount of [bytes, held, budget]) expect(error.message).toContain(`${(amount / 2 ** 20).toFixed(1)} MiB`);
    return error;
  }

  test('a model', async () => {
    let exact = 0;
    await withEngine(model, { dtype: 'float32', train: true }, async (_, device) => {
      exact = device.heldBytes;
    });
    const open = (memoryBytes: number) =>
      withEngine(model, { dtype: 'float32', train: true, memoryBytes }, async (engine) => engine.memory().weights);
    await budgetError(open(exact - 1));
    expect(await open(exact)).toBeDefined();
  });

  test('a call; a smaller one still runs', async () => {
    const [long, short] = sequencesOf(tinyShape, [1000, 20]);
    const plan = planScoring(tinyShape, 'float32', wholeSequences([999]));
    let held = 0;
    await withEngine(model, { dtype: 'float32' }, async (_, device) => {
      held = device.heldBytes;
    });
    await withEngine(model, { dtype: 'float32', memoryBytes: held + plan.total }, async (engine) => {
      const error = await budgetError(scoreTogether(engine, [long!, short!]));
      expect(error.message).toContain('1020 tokens');
      await scoreTogether(engine, [long!.subarray(0, 999)]);
    });
    await withEngine(model, { dtype: 'float32', memoryBytes: held + 1000 }, async (engine) => {
      const error = await budgetError(engine.generate(requestsOf([short!]), sampling));
      expect(error.message).toContain('Generation of 1 sequences');
    });
  });
});

/** The 25-million-parameter Llama of the benches. */
const llama25m: ModelShape = {
  ...smallShape,
  vocabulary: 4096,
  width: 512,
  layers: 8,
  heads: 8,
  keyValueHeads: 8,
  headWidth: 64,
  feedForward: 1408,
  windows: Array.from({ length: 8 }, () => 0),
  tied: true,
};

test('a process that trains holds the planned bytes, within 15 %, and gives them back', async () => {
  const { code, stdout, stderr } = await runModule(
    `${childPrelude(llama25m)}
    import { readFileSync } from 'node:fs';
    const { planTraining, wholeSequences } = await import(${built('layout/memory-plan.js')});
    const anonymous = () => {
      globalThis.gc();
      return Number(/^Anonymous:\\s+(\\d+) kB/m.exec(readFileSync('/proc/self/smaps_rollup', 'utf8'))[1]) * 1024;
    };
    const lengths = [256, 256];
    const pattern = Float32Array.from({ length: 1009 }, (_, i) => Math.sin(i) / 20);
    const idle = anonymous();
    const { device, engine } = open(2, true);
    for (const tensor of checkpointTensors(engine)) {
      const size = tensor.shape.reduce((a, b) => a * b);
      const data = new Float32Array(size);
      for (let at = 0; at < size; at += 1009) data.set(pattern.subarray(0, Math.min(1009, size - at)), at);
      await engine.writeTensor(tensor.name, data);
    }
    await engine.publish();
    const { logprobs } = await forward(engine, lengths, true);
    await engine.backward({ logprobs });
    await engine.step({ learningRate: 1e-4, betas: [0.9, 0.95], epsilon: 1e-8, weightDecay: 0.1, clipNorm: 1, step: 1 });
    const resident = anonymous() - idle;
    const planned = device.heldBytes + planTraining(shape, 'float32', wholeSequences(lengths)).total;
    const memory = engine.memory();
    await engine.close();
    await device.close();
    const closed = anonymous() - idle;
    console.log(JSON.stringify({ idle, resident, planned, closed, memory }));`,
    ['--expose-gc'],
  );
  expect(stderr).toBe('');
  expect(code).toBe(0);
  const { resident, planned, closed } = JSON.parse(stdout);
  expect(resident / planned, stdout).toBeLessThan(1.15);
  expect(resident / planned, stdout).toBeGreaterThan(0.85);
  expect(closed / planned, stdout).toBeLessThan(0.05);
});
