/** What a user is told when GPUs cannot be used, by fault injection into the emulation. */
import './device.js';
import { execFile } from 'node:child_process';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { describe, expect, test } from 'vitest';
import { createDevice } from '../../src/checkpoints/load-model.js';
import { NativeEngine } from '../../src/engine/native-engine.js';
import { testWhere } from '../conditions.js';
import { goldenDirectories, readGolden } from '../native/golden.js';
import { tinyShape } from '../native/support.js';
import { emulated } from './device.js';

const model = goldenDirectories().find(({ directory }) => readGolden(directory).kind === 'lm')!.directory;

interface Ended {
  code: number;
  stdout: string;
  stderr: string;
}

async function lockstep(words: string[], environment: Record<string, string> = {}): Promise<Ended> {
  const env = { ...process.env, LOCKSTEP_DEVICE: 'cuda-emulated', ...environment };
  try {
    const { stdout, stderr } = await promisify(execFile)('node', [join('dist', 'cli', 'main.js'), ...words], { env });
    return { code: 0, stdout, stderr };
  } catch (error) {
    const { code, stdout, stderr } = error as Ended;
    return { code, stdout, stderr };
  }
}

const generate = (...flags: string[]) => ['generate', model, '--prompt', 'a', '--max-new-tokens', '2', ...flags];

describe('generate', () => {
  test.each([
    ['no driver', { LOCKSTEP_EMULATION_FAULT: 'no-driver' }, [], /no NVIDIA driver.*branch 580/],
    ['an old driver', { LOCKSTEP_EMULATION_FAULT: 'old-driver' }, [], /driver is for CUDA 12\.8.*needs 13\.0.*580/],
    ['an old GPU', { LOCKSTEP_EMULATION_FAULT: 'old-architecture' }, [], /compute capability 7\.5.*8\.0 or newer/],
    ['a lost GPU', { LOCKSTEP_EMULATION_FAULT: 'lost' }, [], /fallen off the bus.*--resume/s],
    ['no memory', { LOCKSTEP_EMULATION_MEMORY: '1000' }, [], /takes .* MiB.*nvidia-smi/],
    ['more ranks than GPUs', { LOCKSTEP_EMULATION_DEVICES: '1' }, ['--tensor', '2'], /GPU 1 is needed.*shows 1/],
    ['no NCCL', { LOCKSTEP_EMULATION_FAULT: 'no-nccl' }, ['--pipeline', '2'], /NCCL/],
    ['different GPUs', { LOCKSTEP_EMULATION_FAULT: 'mixed' }, ['--pipeline', '2'], /GPU 0.*GPU 1/s],
  ] as const)('with %s says so and what to do', async (_, environment, flags, message) => {
    const { code, stderr } = await lockstep(generate(...flags), environment);
    expect(stderr).toMatch(message);
    expect(stderr).not.toMatch(/^\s+at /m);
    expect(code).toBe(1);
  });

  test('with an unknown LOCKSTEP_DEVICE names those that there are', async () => {
    const { code, stderr } = await lockstep(generate(), { LOCKSTEP_DEVICE: 'tpu' });
    expect(stderr).toMatch(/LOCKSTEP_DEVICE is 'tpu'.*cpu, cuda/);
    expect(code).toBeGreaterThan(0);
  });

  test('with --device cpu computes where no GPU can', async () => {
    const { code, stderr } = await lockstep(generate('--device', 'cpu'), { LOCKSTEP_EMULATION_FAULT: 'no-driver' });
    expect(stderr).not.toMatch(/driver/);
    expect(code).toBe(0);
  });
});

// As when another process has taken memory since the run was planned.
testWhere(emulated, 'of the emulation')('a GPU that refuses memory that the budget allows is named', async () => {
  process.env.LOCKSTEP_EMULATION_MEMORY = '1000';
  try {
    await using device = createDevice({ threads: 1, memoryBytes: 2 ** 30, processor: 'cuda' });
    expect(() => new NativeEngine({ shape: tinyShape, device, dtype: 'float32' })).toThrow(
      expect.objectContaining({
        code: 'OUT_OF_MEMORY',
        message: expect.stringMatching(/GPU 0 refused \d+ bytes.*memory\.device/),
      }),
    );
  } finally {
    delete process.env.LOCKSTEP_EMULATION_MEMORY;
  }
});

test('a bench with no driver says so and what to do', async () => {
  const { code, stderr } = await lockstep(['bench', 'decode'], { LOCKSTEP_EMULATION_FAULT: 'no-driver' });
  expect(stderr).toMatch(/no NVIDIA driver.*branch 580/);
  expect(stderr).not.toMatch(/defect/);
  expect(code).toBe(1);
});

describe('doctor', () => {
  test('shows the GPUs', async () => {
    const { stdout } = await lockstep(['doctor', '--json']);
    const { gpu } = JSON.parse(stdout) as { gpu: { build: string; gpus: unknown[]; problem: string } };
    expect(gpu).toMatchObject({ build: 'emulated', problem: '' });
    expect(gpu.gpus).toHaveLength(8);
  });

  test('says why there is none, and that models run on the CPU', async () => {
    const { code, stdout } = await lockstep(['doctor'], { LOCKSTEP_EMULATION_FAULT: 'no-driver' });
    expect(stdout).toMatch(/gpu +none used: there is no NVIDIA driver/);
    expect(stdout).toMatch(/^ready$/m);
    expect(code).toBe(0);
  });
});
