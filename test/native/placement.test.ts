/** PPO on one pool, two and four, with real models over ranks: the same bytes; apart, models compute at the same time. */
import { mkdtemp, readFile, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { Device } from '../../src/engine/device.js';
import { withHead } from '../../src/layout/config.js';
import { worldSize } from '../../src/layout/parallel.js';
import { train } from '../../src/train/train.js';
import { digests } from '../digests.js';
import { randomModel, sequencesOf, smallShape, writeCheckpoint } from './support.js';

const shape = { ...smallShape, maxPositions: 128 };

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lockstep-placement-'));
  await writeCheckpoint(randomModel('policy', shape), join(folder, 'policy'));
  await writeCheckpoint(randomModel('scorer', withHead(shape, 'score'), 2), join(folder, 'scorer'));
  const rows = sequencesOf(shape, new Array<number>(16).fill(8)).map((tokens) => ({ tokens: [...tokens] }));
  await writeFile(join(folder, 'rows.jsonl'), rows.map((row) => JSON.stringify(row)).join('\n'));
});

const steps = 2;
const config = () => ({
  algorithm: 'ppo',
  model: join(folder, 'policy'),
  reward: { model: join(folder, 'scorer') },
  data: { train: join(folder, 'rows.jsonl') },
  dtype: 'bfloat16',
  optimizer: { learningRate: 1e-3 },
  batch: { sequences: 8, microTokens: 64 },
  rollout: { samples: 2, maxNewTokens: 12 },
  ppo: { epochs: 2, miniBatches: 2 },
  checks: { mismatch: 'all' },
  memory: { device: '512MiB' },
  numerics: { parts: 2 },
  threads: 2,
  steps,
});

interface Span {
  name: string;
  cat: string;
  tid: number;
  ts: number;
  dur: number;
  args: { step: number; name: string };
}

let runs = 0;
async function run(changes: object): Promise<{ checkpoints: Record<string, string>; trace: Span[] }> {
  const output = join(folder, `run-${runs++}`);
  for await (const event of train({ ...config(), ...changes, output } as never)) {
    if (event.type === 'step') expect(event.metrics['mismatch.max']).toBe(0);
  }
  const trace = JSON.parse(await readFile(join(output, 'trace.json'), 'utf8')) as Span[];
  return { checkpoints: await digests(join(output, 'checkpoints')), trace };
}

const placements = { colocated: 1, split: 2, standalone: 4 };
const layouts = [
  { pipeline: 1, tensor: 1, data: 1 },
  { pipeline: 1, tensor: 2, data: 1 },
  { pipeline: 2, tensor: 1, data: 1 },
];

describe('one, two and four pools give the same checkpoints', () => {
  let expected: Record<string, string> | undefined;
  for (const layout of layouts) {
    test(`each model over pipeline ${layout.pipeline} x tensor ${layout.tensor}`, async () => {
      for (const [placement, pools] of Object.entries(placements)) {
        const { checkpoints, trace } = await run({ placement, parallel: layout });
        expected ??= checkpoints;
        expect(Object.keys(checkpoints).length).toBeGreaterThan(4);
        expect([placement, checkpoints]).toEqual([placement, expected]);
        const rows = trace.filter(({ name }) => name === 'thread_name').map(({ args }) => args.name);
        expect(rows.filter((name) => /rank \d+$/.test(name))).toHaveLength(pools * worldSize(layout));
        if (placement === 'standalone') checkOverlap(trace);
      }
    });
  }
});

/** Each began before the other had ended. */
function checkOverlap(trace: readonly Span[]): void {
  const overlap = (a: Span, b: Span): boolean => a.ts < b.ts + b.dur && b.ts < a.ts + a.dur;
  for (let step = 1; step <= steps; step++) {
    const spanOf = (name: string): Span =>
      trace.find((span) => span.cat === 'phase' && span.name === name && span.args.step === step)!;
    for (const [a, b] of [
      ['values', 'reference'],
      ['values', 'reward'],
      ['reference', 'reward'],
      ['policyUpdate', 'valueUpdate'],
    ] as const) {
      expect([step, a, b, overlap(spanOf(a), spanOf(b))]).toEqual([step, a, b, true]);
    }
  }
}

test('an error of a rank says which rank', async () => {
  await using device = new Device({ threads: 1, rank: 3 });
  const fails = device.run('forward', () =>
    Promise.reject(Object.assign(new Error('no room'), { code: 'OUT_OF_MEMORY' })),
  );
  await expect(fails).rejects.toMatchObject({ code: 'OUT_OF_MEMORY', message: 'no room', details: { rank: 3 } });
});

test('pools whose models take turns, with replicas: offload in each, the same checkpoints again', async () => {
  const layout = { parallel: { data: 2, zero: 1 }, memory: { device: '512MiB', offload: 'host' } };
  const { checkpoints } = await run({ ...layout, placement: 'split' });
  expect(checkpoints).toEqual((await run({ ...layout, placement: 'colocated' })).checkpoints);
});
