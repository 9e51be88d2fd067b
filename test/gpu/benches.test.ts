/** The measurements that `bench/gpu/run` makes run where the GPU is emulated: results are verified, figures of each kind come out. */
import './device.js';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { iterations } from '../../bench/iterations.js';
import { createDevice, randomEngine, shapeOf, statedOf } from '../../bench/support.js';
import { treeCost } from '../../bench/training.js';
import { trainingStep } from '../../bench/training-step.js';
import type { Bench, Measurement } from '../../src/cli/bench.js';
import { slow } from '../conditions.js';

const options = { signal: new AbortController().signal, threads: 2, runs: 1, note: () => undefined };

async function measured(bench: Bench): Promise<Measurement[]> {
  const lines: Measurement[] = [];
  for await (const line of bench.measure(options)) lines.push(line);
  return lines;
}

const benches: Record<string, { load: () => Promise<Bench>; units: string[] }> = {
  ceilings: { load: () => import('../../bench/ceilings.js'), units: ['GF/s', 'GB/s', 'µs'] },
  gemm: { load: () => import('../../bench/gemm.js'), units: ['share of ceiling'] },
  attention: { load: () => import('../../bench/attention.js'), units: ['share of ceiling'] },
  optimizer: { load: () => import('../../bench/optimizer.js'), units: ['times the bytes at bandwidth'] },
  decode: { load: () => import('../../bench/decode.js'), units: ['tokens/s', 'share of memory bandwidth'] },
  speculation: { load: () => import('../../bench/speculation.js'), units: ['times the tokens/s without guesses'] },
  training: {
    load: () => import('../../bench/training.js'),
    units: ['tokens/s', 'share of the multiply-add peak', 'share of a training step'],
  },
  iteration: { load: () => import('../../bench/iteration.js'), units: ['s', 'share of an iteration'] },
  offload: { load: () => import('../../bench/offload.js'), units: ['GB/s', 'share of pinned copies'] },
};

for (const [name, { load, units }] of Object.entries(benches)) {
  slow(name, async () => {
    const lines = await measured(await load());
    for (const unit of units) expect(lines.map((line) => line.unit)).toContain(unit);
    for (const { value } of lines) expect(Number.isFinite(value)).toBe(true);
    // A name tells one line of a bench from the others: bench/peers/compare.py looks them up by it.
    expect(new Set(lines.map((line) => line.name)).size).toBe(lines.length);
  });
}

test.each([
  ['NVIDIA H100 80GB HBM3', 989, 3350],
  ['NVIDIA H100 PCIe', 756, 2039],
  ['NVIDIA H100 NVL', 835, 3938],
  ['NVIDIA H200', 989, 4800],
  ['NVIDIA H200 NVL', 835, 4800],
  ['NVIDIA A100-SXM4-80GB', 312, 2039],
  ['NVIDIA A100 80GB PCIe', 312, 1935],
  ['NVIDIA A100-PCIE-40GB', 312, 1555],
])('the data sheet of %s states %i TFLOP/s and %i GB/s', (name, flops, bytes) => {
  expect(statedOf(name)).toEqual({ flops: flops * 1e12, bytes: bytes * 1e9 });
});

test('a GPU whose data sheet is not known is no other GPU', () => expect(statedOf('NVIDIA T4')).toBeUndefined());

slow('iterations save no checkpoint, and take no host memory for one', async () => {
  const output = await mkdtemp(join(tmpdir(), 'lockstep-benches-'));
  try {
    const settings = { algorithm: 'ppo', ppo: { miniBatches: 1 }, memory: { host: '1KiB' }, output };
    expect(await iterations(options, settings)).toHaveLength(options.runs);
    expect(await readdir(join(output, 'checkpoints')).catch(() => [])).toEqual([]);
  } finally {
    await rm(output, { recursive: true, force: true });
  }
});

test('what parts cost is not measured where two models do not fit, and the bench says so', async () => {
  const room = 3 << 20; // bfloat16: a model of 1.7 MiB, of one step 0.5 MiB
  await using device = createDevice({ threads: 2, memoryBytes: room });
  await using split = await randomEngine({ shape: shapeOf('tiny'), device, dtype: 'bfloat16', train: true });
  const notes: string[] = [];
  const note = (line: string) => notes.push(line);
  expect(await treeCost(split, 'bfloat16', device, { ...options, note })).toBeUndefined();
  expect(notes).toEqual([
    expect.stringMatching(/^parts 1 against 1 are not measured, two models do not fit: The model/),
  ]);
  await trainingStep(split, 1);
});

// The shape tiny, by hand: two layers of qkv, output, gate and up, down; the tied vocabulary once.
const matrices = 2 * ((4 + 2 * 2) * 16 * 64 + 64 * 64 + 2 * 128 * 64 + 128 * 64) + 320 * 64;

slow('a training step counts three times the multiply-adds of its 2 x 32 tokens', async () => {
  const lines = await measured(await import('../../bench/training.js'));
  const attention = 2 * 4 * 16 * 2 * ((32 * 33) / 2); // layers, heads, their width, two products, pairs
  const utilization = lines.filter(({ name }) => name.startsWith('utilization'));
  expect(utilization).toHaveLength(2);
  for (const line of utilization) expect(line.multiplyAdds).toBe(3 * 2 * (32 * matrices + attention));
});

slow('a decode step counts its matrices, and keys and values of contexts of 8 + 2 tokens', async () => {
  const lines = await measured(await import('../../bench/decode.js'));
  const bytes = (sequences: number) => matrices + sequences * (8 + 2) * 2 * 2 * 2 * 16; // keys and values, layers, heads, width
  const counted = lines.filter(({ name }) => name.startsWith('decode reads')).map(({ stepBytes }) => stepBytes);
  expect(counted).toEqual([2 * bytes(1), 2 * bytes(2), 4 * bytes(1), 4 * bytes(2)]);
});
