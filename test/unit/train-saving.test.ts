/** Checkpoints behind the steps: they change no file, are one at a time, and fail no later than the next step boundary. */
import { appendFile, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { openCheckpoint } from '../../src/checkpoints/hugging-face.js';
import { awaitedLater } from '../../src/engine/device.js';
import type { Engine, Saving } from '../../src/engine/engine.js';
import { LockstepError } from '../../src/errors.js';
import type { Backend } from '../../src/inference/backend.js';
import type { ConfigInput } from '../../src/train/config.js';
import type { TrainEvent } from '../../src/train/events.js';
import { architectureWarning, dataWarnings, layoutWarning, sameBits } from '../../src/train/resumed-bits.js';
import { type TrainOptions, train } from '../../src/train/train.js';
import { digests } from '../digests.js';
import { tableBackend, writeTableModel } from './train-fake-engine.js';

let model: string;
let folder: string;

beforeAll(async () => {
  model = await writeTableModel();
  folder = await mkdtemp(join(tmpdir(), 'lockstep-saving-'));
  const rows = Array.from({ length: 20 }, (_, i) => ({ tokens: [2 + i, 3 + i, 4, 5, 1].map((t) => t % 24) }));
  await writeFile(join(folder, 'text.jsonl'), rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
});

let outputs = 0;
function sft(changes: Record<string, unknown> = {}): ConfigInput & { output: string } {
  return {
    algorithm: 'sft',
    model,
    data: { train: join(folder, 'text.jsonl') },
    dtype: 'float32',
    optimizer: { learningRate: 0.05 },
    batch: { sequences: 8 },
    steps: 6,
    checkpoint: { every: 2, keep: 100 },
    output: join(folder, `run-${outputs++}`),
    ...changes,
  } as ConfigInput & { output: string };
}

async function run(config: ConfigInput, options: TrainOptions = {}, events: TrainEvent[] = []): Promise<TrainEvent[]> {
  for await (const event of train(config, { backend: tableBackend, ...options })) events.push(event);
  return events;
}

/** The table backend, whose saves and steps are done by way of `hooks`. */
function backendWith(hooks: { saving?: (saving: Saving) => Saving; step?: () => void; close?: () => void }): Backend {
  return {
    openDevice: async (settings) => {
      const device = await tableBackend.openDevice(settings);
      return {
        close: async () => hooks.close?.(),
        createEngine: async (checkpoint, options) => {
          const engine = await device.createEngine(checkpoint, options);
          const [save, step] = [engine.save.bind(engine), engine.step.bind(engine)];
          const replaced: Partial<Engine> = {
            save: async (tensors, how) => {
              const saving = await save(tensors, how);
              return hooks.saving?.(saving) ?? saving;
            },
            step: (how) => {
              hooks.step?.();
              return step(how);
            },
          };
          return Object.assign(engine, replaced);
        },
      };
    },
  };
}

const order = (events: readonly TrainEvent[]) =>
  events.flatMap((event) =>
    event.type === 'step' || event.type === 'checkpoint' ? `${event.type} ${event.step}` : [],
  );
const later = (milliseconds: number) => new Promise<void>((resolve) => setTimeout(resolve, milliseconds));

describe('a checkpoint', () => {
  it('has the same bytes written behind the steps and between them', async () => {
    const [behind, between] = [sft(), sft({ checkpoint: { every: 2, keep: 100, async: false } })];
    const copied = (events: TrainEvent[]) =>
      events.flatMap((event) => (event.type === 'checkpoint' ? event.copiedBytes : []));
    expect(copied(await run(behind)).every((bytes) => bytes > 0)).toBe(true);
    const events = await run(between);
    expect(copied(events)).toEqual([0, 0, 0]);
    expect(order(events)).toEqual(
      [1, 2, 3, 4, 5, 6].flatMap((n) => [`step ${n}`, ...(n % 2 ? [] : [`checkpoint ${n}`])]),
    );
    const [a, b] = await Promise.all([behind, between].map(({ output }) => digests(join(output, 'checkpoints'))));
    expect(a).toEqual(b);
    expect(Object.keys(a!).length).toBeGreaterThan(9);
  });

  it('is written while the next step runs', async () => {
    // Nothing is written before the next step begins; after the last one there is none to wait for.
    const begun: string[] = [];
    let begin = () => {};
    const saving = ({ copiedBytes, written }: Saving): Saving => {
      const step = new Promise<string>((resolve) => {
        const before = begin;
        begin = () => {
          before();
          resolve('step');
        };
      });
      const time = later(1000).then(() => 'time');
      const first = Promise.race([step, time]).then((by) => begun.push(by));
      return { copiedBytes, written: first.then(() => written) };
    };
    const events = order(await run(sft(), { backend: backendWith({ saving, step: () => begin() }) }));
    // The model and its optimizer state, three times.
    expect(begun).toEqual(['step', 'step', 'step', 'step', 'time', 'time']);
    const inOrder = (...names: string[]) => {
      const places = names.map((name) => events.indexOf(name));
      expect([events, places]).toEqual([events, places.toSorted((a, b) => a - b)]);
    };
    inOrder('step 2', 'step 3', 'checkpoint 2', 'checkpoint 4');
    inOrder('step 4', 'step 5', 'checkpoint 4', 'checkpoint 6');
    expect(events).toHaveLength(9);
  });

  it('waits for the one before', async () => {
    let [flying, most] = [0, 0];
    const saving = ({ copiedBytes, written }: Saving): Saving => {
      most = Math.max(most, ++flying);
      return {
        copiedBytes,
        written: later(60)
          .then(() => written)
          .finally(() => flying--),
      };
    };
    const config = sft({ checkpoint: { every: 1, keep: 100 } });
    await run(config, { backend: backendWith({ saving }) });
    // The model and its optimizer state.
    expect(most).toBe(2);
    expect(await readdir(join(config.output, 'checkpoints'))).toHaveLength(6);
  });

  it('is waited for when the run is aborted, and when a step fails', async () => {
    const slow = ({ copiedBytes, written }: Saving): Saving => ({
      copiedBytes,
      written: later(100).then(() => written),
    });
    const controller = new AbortController();
    const aborted = sft({ checkpoint: { every: 2, keep: 100 } });
    const backend = backendWith({ saving: slow });
    for await (const event of train(aborted, { backend, signal: controller.signal })) {
      if (event.type === 'step' && event.step === 3) controller.abort();
      if (event.type === 'interrupted') expect(event.checkpoint).toMatch(/step-000003$/);
    }
    expect(await readdir(join(aborted.output, 'checkpoints'))).toEqual(['step-000002', 'step-000003']);

    let steps = 0;
    const step = () => {
      if (++steps === 3) throw new LockstepError('GRADIENT_NOT_FINITE', 'too large');
    };
    const failed = sft();
    await expect(run(failed, { backend: backendWith({ saving: slow, step }) })).rejects.toMatchObject({
      code: 'GRADIENT_NOT_FINITE',
    });
    expect(await readdir(join(failed.output, 'checkpoints'))).toEqual(['step-000002']);
    await openCheckpoint(join(failed.output, 'checkpoints', 'step-000002'));
  });

  it('that cannot be written ends the run at the next step boundary, and leaves the one before', async () => {
    let saves = 0;
    const saving = ({ copiedBytes, written }: Saving): Saving => {
      const full = () => {
        throw new LockstepError(
          'CHECKPOINT_WRITE_FAILED',
          'Cannot write x: pwrite at byte 0: No space left on device.',
        );
      };
      const failing = ++saves > 2 ? written.then(full) : written;
      failing.catch(() => undefined);
      return { copiedBytes, written: failing };
    };
    const config = sft({ checkpoint: { every: 2, keep: 100 }, steps: 40 });
    const events: TrainEvent[] = [];
    const backend = backendWith({ saving });
    await expect(run(config, { backend }, events)).rejects.toMatchObject({
      code: 'CHECKPOINT_WRITE_FAILED',
      message: expect.stringContaining('No space left'),
    });
    expect(Number(order(events).at(-1)!.split(' ')[1])).toBeLessThanOrEqual(6);
    expect(await readdir(join(config.output, 'checkpoints'))).toEqual(['step-000002']);
    expect((await readdir(config.output)).filter((name) => name.startsWith('.'))).toEqual([]);
    expect(await run(config, { resume: true })).toContainEqual(expect.objectContaining({ type: 'done', step: 40 }));
  });

  it('that cannot be written is what the run ends with, whatever closing says; closing has its say otherwise', async () => {
    const full = (code: 'CHECKPOINT_WRITE_FAILED' | 'DEVICE_LOST') => () => {
      throw new LockstepError(code, 'no more');
    };
    const saving = ({ copiedBytes, written }: Saving) => ({
      copiedBytes,
      written: awaitedLater(written.then(full('CHECKPOINT_WRITE_FAILED'))),
    });
    const close = full('DEVICE_LOST');
    const config = sft();
    await expect(run(config, { backend: backendWith({ saving, close }) })).rejects.toMatchObject({
      code: 'CHECKPOINT_WRITE_FAILED',
    });
    await expect(run(sft(), { backend: backendWith({ close }) })).rejects.toMatchObject({ code: 'DEVICE_LOST' });
    expect(await run(config, { resume: true })).toContainEqual(expect.objectContaining({ type: 'done', step: 6 }));
  });

  it('is refused when its copy does not fit into the host memory, unless nothing is copied', async () => {
    const memory = { host: 1000 };
    await expect(run(sft({ memory }))).rejects.toMatchObject({
      code: 'MEMORY_BUDGET',
      message: expect.stringMatching(
        /for a checkpoint.s copy of policy in host memory, more than memory.host .* checkpoint.async/,
      ),
    });
    await run(sft({ memory, checkpoint: { async: false } }));
  });
});

it('checkpoints have the tokenizer that the model had at the start, also when its folder goes away', async () => {
  const start = await writeTableModel();
  await writeFile(join(start, 'special_tokens_map.json'), '{}');
  const config = sft({ model: start });
  for await (const { type } of train(config, { backend: tableBackend }))
    if (type === 'start') await rm(start, { recursive: true });
  for (const name of await readdir(join(config.output, 'checkpoints')))
    expect(await readdir(join(config.output, 'checkpoints', name))).toContain('special_tokens_map.json');
});

it('a trace that cannot be written ends no run', async () => {
  const config = sft();
  await mkdir(join(config.output, 'trace.json'), { recursive: true });
  const events = await run(config);
  expect(events).toContainEqual(expect.objectContaining({ type: 'done', step: 6 }));
  expect(events.filter(({ type }) => type === 'warning')).toMatchObject([
    { code: 'TRACE_ENDED', step: 1, message: expect.stringContaining('EISDIR') },
  ]);
});

describe('a run that continues in another layout', () => {
  const one = { pipeline: 1, tensor: 1, data: 1, zero: 0 };
  const plain = { headNorm: false };
  const headNorm = { headNorm: true };

  it.each([
    [one, { ...one, pipeline: 4, tensor: 8 }, [plain], true],
    [{ ...one, data: 2 }, { ...one, data: 2, zero: 3 }, [plain, headNorm], true],
    [one, { ...one, pipeline: 2 }, [headNorm], true],
    [one, { ...one, tensor: 2 }, [headNorm], false],
    [one, { ...one, tensor: 2 }, [plain, headNorm], false],
    [one, { ...one, data: 2 }, [plain], false],
    [{ ...one, data: 4, tensor: 2 }, { ...one, data: 2, tensor: 4 }, [plain], false],
  ])('from %j to %j with %j: the same bits: %s', (before, now, trained, same) => {
    expect(sameBits(before, now, trained)).toBe(same);
    expect(layoutWarning(before, now, trained) === undefined).toBe(same);
  });

  it('is warned when its bits cannot be the same', async () => {
    const config = sft();
    await run({ ...config, steps: 2 });
    const path = join(config.output, 'config.yaml');
    const before = await readFile(path, 'utf8');
    const edited = before.replace(/^ {2}data: 1$/m, '  data: 2');
    expect(edited).not.toBe(before);
    await writeFile(path, edited);
    const warnings = (events: TrainEvent[]) => events.filter(({ type }) => type === 'warning');
    expect(warnings(await run({ ...config, steps: 4 }, { resume: true }))).toMatchObject([
      { code: 'LAYOUT_DIFFERS', message: expect.stringMatching(/tensor 1, data 2, zero 0 and continues in .* data 1/) },
    ]);
    expect(warnings(await run({ ...config, steps: 6 }, { resume: true }))).toEqual([]);
  });
});

describe('a run that continues with a data file that has changed', () => {
  const row = (i: number) => `${JSON.stringify({ tokens: [2 + i, 3 + i, 4] })}\n`;
  const warnings = (events: TrainEvent[]) => events.filter(({ type }) => type === 'warning');

  it('is warned, once', async () => {
    const train = join(folder, 'growing.jsonl');
    await writeFile(train, [0, 1, 2].map(row).join(''));
    const config = sft({ data: { train } });
    await run({ ...config, steps: 2 });
    expect(warnings(await run({ ...config, steps: 3 }, { resume: true }))).toEqual([]);
    await appendFile(train, row(3));
    expect(warnings(await run({ ...config, steps: 4 }, { resume: true }))).toMatchObject([
      { code: 'DATA_DIFFERS', message: expect.stringMatching(/data.train had 3 rows in 57 bytes and has 4 in 76/) },
    ]);
    expect(warnings(await run({ ...config, steps: 5 }, { resume: true }))).toEqual([]);
  });

  it('is warned of ptx data, and of nothing by a checkpoint that does not say', () => {
    const [before, now] = [{ 'ptx.data': { rows: 3, bytes: 9 } }, { 'ptx.data': { rows: 3, bytes: 8 } }];
    expect(dataWarnings(before, now)).toMatchObject([{ message: expect.stringContaining('ptx.data had 3 rows in 9') }]);
    expect(dataWarnings({}, now)).toEqual([]);
  });
});

describe('a run that continues on other processors', () => {
  const gpu = (computeCapability: string, name = 'a GPU') => ({ gpus: [{ name, computeCapability }] });
  const cpu = { gpus: [] };

  it.each([
    [gpu('9.0', 'H100'), gpu('9.0', 'H200'), 'bfloat16', true],
    [gpu('8.0'), gpu('9.0'), 'bfloat16', false],
    [gpu('8.0'), gpu('9.0'), 'float32', true],
    [cpu, gpu('8.0'), 'bfloat16', false],
    [gpu('8.0'), cpu, 'bfloat16', false],
    [cpu, cpu, 'bfloat16', true],
    [undefined, gpu('8.0'), 'bfloat16', true],
  ] as const)('from %j to %j in %s: no warning: %s', (before, now, dtype, same) => {
    const copy = (given: { readonly gpus: readonly { name: string; computeCapability: string }[] }) => ({
      gpus: [...given.gpus],
    });
    const warning = architectureWarning(before && copy(before), copy(now), dtype);
    expect(warning === undefined).toBe(same);
    if (warning) expect(warning).toMatchObject({ code: 'ARCHITECTURE_DIFFERS' });
  });

  it('is told which they were', async () => {
    const config = sft({ dtype: 'bfloat16' });
    await run({ ...config, steps: 2 });
    const path = join(config.output, 'device.json');
    expect(JSON.parse(await readFile(path, 'utf8'))).toEqual(cpu);
    await writeFile(path, JSON.stringify(gpu('9.0', 'NVIDIA H100')));
    const warnings = (events: TrainEvent[]) => events.filter(({ type }) => type === 'warning');
    expect(warnings(await run({ ...config, steps: 4 }, { resume: true }))).toMatchObject([
      {
        code: 'ARCHITECTURE_DIFFERS',
        message: expect.stringMatching(/on NVIDIA H100 \(compute capability 9.0\) and continues on a CPU/),
      },
    ]);
    expect(warnings(await run({ ...config, steps: 6 }, { resume: true }))).toEqual([]);
  });
});
