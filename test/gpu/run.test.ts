/** Whole runs on a GPU write the checkpoint bytes of the CPU: PPO, offloaded too, and resumed. */
import './device.js';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { withHead } from '../../src/layout/config.js';
import { train } from '../../src/train/train.js';
import { slow } from '../conditions.js';
import { digests } from '../digests.js';
import { randomModel, sequencesOf, tinyShape, writeCheckpoint } from '../native/support.js';
import { sameAsCpu } from './device.js';

const shape = { ...tinyShape, maxPositions: 64, windows: [0, 0] };

let folder: string;
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lockstep-gpu-run-'));
  await writeCheckpoint(randomModel('policy', shape), join(folder, 'policy'));
  await writeCheckpoint(randomModel('scorer', withHead(shape, 'score'), 2), join(folder, 'scorer'));
  const rows = sequencesOf(shape, new Array<number>(8).fill(10)).map((tokens) => ({ tokens: [...tokens] }));
  await writeFile(join(folder, 'rows.jsonl'), rows.map((row) => JSON.stringify(row)).join('\n'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const ppo = (dtype: string) => ({
  algorithm: 'ppo',
  dtype,
  model: join(folder, 'policy'),
  reward: { model: join(folder, 'scorer') },
  data: { train: join(folder, 'rows.jsonl') },
  optimizer: { learningRate: 1e-3 },
  batch: { sequences: 4, microTokens: 64 },
  rollout: { maxNewTokens: 8 },
  ppo: { miniBatches: 2 },
  checks: { mismatch: 'all' },
  memory: { device: '256MiB' },
  steps: 2,
  checkpoint: { every: 1 },
});

let runs = 0;
async function run(config: object) {
  const output = join(folder, `run-${runs++}`);
  let mismatch = 0;
  let compared = 0;
  for await (const event of train({ ...config, output } as never)) {
    if (event.type !== 'step') continue;
    mismatch = Math.max(mismatch, (event.metrics['mismatch.max'] as number) ?? 0);
    compared += (event.metrics['mismatch.tokens'] as number) ?? 0;
  }
  expect(compared).toBeGreaterThan(0);
  expect(mismatch).toBe(0);
  return digests(join(output, 'checkpoints'));
}

for (const [i, dtype] of (['bfloat16', 'float32'] as const).entries()) {
  (i === 0 ? test : slow)(`PPO writes the CPU's checkpoints, with mismatch 0, ${dtype}`, async () => {
    const gpu = await run({ ...ppo(dtype), device: 'cuda' });
    if (sameAsCpu(dtype)) expect(gpu).toEqual(await run({ ...ppo(dtype), device: 'cpu' }));
    const offloaded = { ...ppo(dtype), device: 'cuda', memory: { device: '256MiB', offload: 'host' } };
    expect(await run(offloaded)).toEqual(gpu);
  });
}

test("PPO over two GPUs that generate one by one (3D-HybridEngine) writes one CPU's checkpoints", async () => {
  const config = { ...ppo('float32'), numerics: { parts: 2 } };
  const layouts = { parallel: { tensor: 2 }, generation: { tensor: 1, transition: 'hybridflow' } };
  expect(await run({ ...config, ...layouts, device: 'cuda' })).toEqual(await run({ ...config, device: 'cpu' }));
});
