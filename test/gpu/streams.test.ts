/**
 * What the streams of GPUs did, as works and traces tell it: within the calls that it was done for, one after the other, and with the
 * bytes that moving state counts. And the ranges that a profiler sees.
 */
import './device.js';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { createDevice } from '../../src/checkpoints/load-model.js';
import { packBatch } from '../../src/data/batch.js';
import type { Work } from '../../src/engine/device.js';
import type { StreamWork } from '../../src/engine/native.js';
import { withHead } from '../../src/layout/config.js';
import { stateGroups } from '../../src/layout/rotation.js';
import { parseConfig } from '../../src/train/config.js';
import { preflight } from '../../src/train/preflight.js';
import { rolesOf } from '../../src/train/roles.js';
import { train } from '../../src/train/train.js';
import { testWhere } from '../conditions.js';
import { randomModel, requestsOf, sampling, sequencesOf, tinyShape, writeCheckpoint } from '../native/support.js';
import { options, trainOver } from '../native/training-support.js';
import { emulated } from './device.js';

const wide = { heads: 8, headWidth: 8, keyValueHeads: 4, feedForward: 128 };
const shape = { ...tinyShape, ...wide, maxPositions: 64, windows: [0, 0] };
const model = randomModel('tiny', shape);

let folder: string;
beforeAll(async () => {
  delete process.env.CUDA_MODULE_LOADING;
  folder = await mkdtemp(join(tmpdir(), 'lockstep-gpu-streams-'));
  // Before the first range of this process.
  process.env.LOCKSTEP_EMULATION_RANGES = join(folder, 'ranges');
});
afterAll(() => rm(folder, { recursive: true, force: true }));

/** The works of a model that generates, learns, and goes to the host and back. */
async function works(processor: 'cpu' | 'cuda') {
  const told: Work[] = [];
  await using device = createDevice({ threads: 1, processor, onWork: (work) => told.push(work) });
  await using engine = await model.open({ device, dtype: 'float32', train: true });
  const prompts = sequencesOf(shape, [5, 9]);
  await engine.generate(requestsOf(prompts), { ...sampling, maxNewTokens: 8 });
  const batch = packBatch(sequencesOf(shape, [20, 9, 17]));
  const { logprobs } = await engine.forward(batch, { outputs: ['logprobs'], keep: true });
  await engine.backward({ logprobs: logprobs!.map(() => 1e-2) });
  await engine.step(options);
  const away = { parameters: 'host', gradients: 'dropped', optimizer: 'file' } as const;
  await engine.move(away);
  await engine.move({ parameters: 'device', gradients: 'device', optimizer: 'device' });
  const counts = stateGroups.map((group) => engine.state.counts()[group]);
  const bytes = (name: 'offloadBytes' | 'restoreBytes') => counts.reduce((sum, count) => sum + count[name], 0);
  return { told, offloadBytes: bytes('offloadBytes'), restoreBytes: bytes('restoreBytes') };
}

const seconds = ({ begin, end }: { begin: number; end: number }): number => end - begin;

test('a call has the work of its stream within its own, and copies have the bytes that moving state counts', async () => {
  const { told, offloadBytes, restoreBytes } = await works('cuda');
  const compute = (work: Work) => work.streams!.filter(({ stream }) => stream === 'compute');
  for (const operation of ['generate', 'forward', 'backward', 'step'] as const) {
    const [work] = told.filter((each) => each.operation === operation);
    const [own, ...others] = compute(work!);
    expect(others, operation).toEqual([]);
    expect(own, operation).toMatchObject({ gpu: 0, bytes: 0 });
    expect(own!.busy, operation).toBeGreaterThan(0);
    expect(own!.busy, operation).toBeLessThan(seconds(own!) + 1e-9);
    // Kernels take nearly all of the time of a call where they are emulated.
    if (emulated) expect(own!.busy / seconds(work!), operation).toBeGreaterThan(0.3);
  }
  const [generate] = told.filter(({ operation }) => operation === 'generate');
  // The host samples nothing, but it takes every token.
  expect(compute(generate!)[0]!.busy).toBeLessThan(seconds(compute(generate!)[0]!));
  for (const { operation, begin, end, streams } of told) {
    for (const work of streams!) {
      expect(work.begin, operation).toBeGreaterThanOrEqual(begin);
      expect(work.end, operation).toBeLessThanOrEqual(end);
      expect(work.bytes > 0, operation).toBe(work.stream !== 'compute');
    }
  }
  const moved = told.filter(({ operation }) => operation === 'move');
  expect(moved).toHaveLength(2);
  const copied = (stream: StreamWork['stream']) =>
    moved.flatMap(({ streams }) => streams!.filter((work) => work.stream === stream)).map(({ bytes }) => bytes);
  const sum = (bytes: readonly number[]) => bytes.reduce((a, b) => a + b, 0);
  expect(offloadBytes).toBeGreaterThan(0);
  expect(sum(copied('to host'))).toBe(offloadBytes);
  expect(sum(copied('from host'))).toBe(restoreBytes);
});

test('on a CPU there are no streams', async () => {
  const { told } = await works('cpu');
  expect(told.map(({ operation }) => operation)).toEqual(expect.arrayContaining(['generate', 'backward', 'move']));
  expect(told.filter(({ streams }) => streams !== undefined)).toEqual([]);
});

interface Event {
  name: string;
  cat?: string;
  ph: string;
  tid: number;
  ts: number;
  dur: number;
  args: { name?: string; busy?: number; bytes?: number };
}

async function traced(device: 'cuda' | 'cpu'): Promise<Event[]> {
  await writeCheckpoint(model, join(folder, 'policy'));
  await writeCheckpoint(randomModel('scorer', withHead(shape, 'score'), 2), join(folder, 'scorer'));
  const rows = sequencesOf(shape, [30, 20, 25, 30]).map((tokens) => ({ tokens: [...tokens] }));
  await writeFile(join(folder, 'rows.jsonl'), rows.map((row) => JSON.stringify(row)).join('\n'));
  const output = join(folder, `run-${device}`);
  const config = {
    ...{ algorithm: 'remax', device, output, dtype: 'float32', model: join(folder, 'policy') },
    data: { train: join(folder, 'rows.jsonl') },
    ...{ batch: { sequences: 4, microTokens: 64 }, rollout: { maxNewTokens: 6 } },
    reward: { model: join(folder, 'scorer') },
    ...{ memory: { offload: 'host' }, steps: 2 },
    ...{ parallel: { tensor: 2 }, numerics: { parts: 2 } },
  };
  // What its largest call needs, so that state has to move.
  const parsed = parseConfig(config);
  const least = preflight(await rolesOf(parsed), parsed).memory.totalBytes;
  for await (const _ of train({ ...config, memory: { offload: 'host', device: least } } as never));
  return JSON.parse(await readFile(join(output, 'trace.json'), 'utf8')) as Event[];
}

test("a run's trace has rows for the streams of each GPU, whose spans do not overlap", async () => {
  const events = await traced('cuda');
  const rows = new Map(events.filter(({ ph }) => ph === 'M').map(({ tid, args }) => [args.name!, tid]));
  const spansOf = (row: string) => events.filter(({ ph, tid }) => ph === 'X' && tid === rows.get(row));
  for (const rank of [0, 1]) {
    for (const stream of ['compute', 'to host', 'from host']) {
      const spans = spansOf(`GPU ${rank} ${stream}`).sort((a, b) => a.ts - b.ts || a.dur - b.dur);
      expect(spans.length, stream).toBeGreaterThan(0);
      expect(new Set(spans.map(({ cat }) => cat))).toEqual(new Set(['stream']));
      for (const [i, { ts }] of spans.entries()) {
        if (i > 0) expect(ts, stream).toBeGreaterThanOrEqual(spans[i - 1]!.ts + spans[i - 1]!.dur);
      }
      if (stream !== 'compute') continue;
      const works = spansOf(`rank ${rank}`).filter(({ cat }) => cat === 'compute');
      for (const { name, ts, dur } of works.filter((work) => /forward|backward|step|generate/.test(work.name))) {
        const own = spans.filter((span) => span.name === name && span.ts >= ts && span.ts + span.dur <= ts + dur);
        expect(own, `${name} at ${ts}`).toHaveLength(1);
      }
    }
  }
  const cpu = await traced('cpu');
  expect(cpu.filter(({ cat, args }) => cat === 'stream' || args.name?.startsWith('GPU'))).toEqual([]);
});

testWhere(emulated, 'the profiler is emulated')(
  'ranges name calls, layers, buckets, copies, and lie within each other',
  async () => {
    await works('cuda');
    await trainOver(model, { data: 2 }, 'float32');
    const open = new Map<string, string[]>();
    const seen = new Set<string>();
    for (const line of (await readFile(join(folder, 'ranges'), 'utf8')).trim().split('\n')) {
      const [, thread, sign, name] = /^(\d+) ([+-]) ?(.*)$/.exec(line)!;
      const stack = open.get(thread!) ?? [];
      open.set(thread!, stack);
      if (sign === '-') expect(stack.pop(), line).toBeDefined();
      else seen.add([...stack, name].join(' > ')) && stack.push(name!);
    }
    expect([...open.values()].flat()).toEqual([]);
    const expected = [
      ...['load', 'load > publish', 'forward', 'forward > layers.1.forward', 'backward > layers.0.backward', 'step'],
      ...['generate > prefill > layers.0.forward', 'generate > decode', 'generate > decode > layers.1.forward'],
      ...['evict parameters > copy to host', 'evict optimizer > copy to host', 'restore parameters > copy from host'],
      'all-reduce gradients of bucket 0',
    ];
    expect([...seen]).toEqual(expect.arrayContaining(expected));
  },
);

test('all kernels are loaded at the start, where the environment does not say otherwise', async () => {
  await using device = createDevice({ threads: 1, processor: 'cuda' });
  expect(device).toBeDefined();
  expect(process.env.CUDA_MODULE_LOADING).toBe('EAGER');
});
