// Every CUDA kernel, under the emulation, equals the reference bit for bit: one test per case of the native contract suite.
// Each trial runs its threads and copies in three orders. With LOCKSTEP_TEST_ALL=1 as many shapes as a case asks for.
import { execFile, execFileSync, spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { everything } from '../conditions.js';

const release = join(process.cwd(), 'build', 'Release');
const suite = process.env.LOCKSTEP_KERNEL_CONTRACTS ?? join(release, 'kernel_contracts');
const seed = process.env.LOCKSTEP_CONTRACTS_SEED ?? '1';
const trials = everything ? [] : ['--most', '3'];

function listed(): string[] {
  if (!existsSync(suite)) return [];
  return execFileSync(suite, ['--list'], { encoding: 'utf8' }).trim().split('\n');
}

function run(name: string): Promise<{ status: number; output: string }> {
  const args = ['--implementation', 'cuda', '--case', name, '--seed', seed, ...trials];
  return new Promise((resolve) => {
    execFile(suite, args, { maxBuffer: 64 << 20 }, (error, stdout, stderr) => {
      resolve({ status: error === null ? 0 : 1, output: `${stdout}${stderr}${error?.signal ?? ''}` });
    });
  });
}

describe('the kernel contract suite', () => {
  it('is built', () => {
    expect(existsSync(suite), `${suite} is missing: run npm run build -- --tests`).toBe(true);
    expect(listed().length).toBeGreaterThan(40);
  });

  it('multiplies where the emulation says that elements lie', () => {
    const layout = spawnSync(join(release, 'mma_layout'), { encoding: 'utf8' });
    expect(layout.status, `${layout.stdout}${layout.stderr}${layout.error ?? ''}`).toBe(0);
  });
});

describe('cuda gives the bits of the reference', () => {
  it.for(listed())('%s', async (name) => {
    const { status, output } = await run(name);
    expect(status, output).toBe(0);
  });
});
