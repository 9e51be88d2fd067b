// Every kernel on every instruction set of this machine equals the reference bit for bit: one test per case of the native
// contract suite and implementation. The suite draws awkward shapes from a seed, runs 1, 2 and 3 threads, and compares all
// memory that either side may have written.
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';

const suite = process.env.LOCKSTEP_KERNEL_CONTRACTS ?? join(process.cwd(), 'build', 'Release', 'kernel_contracts');
const seed = process.env.LOCKSTEP_CONTRACTS_SEED ?? '1';

function lines(flag: string): string[] {
  if (!existsSync(suite)) return [];
  return execFileSync(suite, [flag], { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] })
    .split('\n')
    .filter((line) => line !== '');
}

const cases = lines('--list');
// The CUDA kernels have a room of their own, test/gpu.
const implementations = lines('--implementations').filter((name) => name !== 'cuda');

describe('the kernel contract suite', () => {
  it('is built', () => {
    expect(existsSync(suite), `${suite} is missing: run npm run build -- --tests`).toBe(true);
  });

  it('knows the reference and at least one instruction set, and every family of kernels', () => {
    expect(implementations).toContain('reference');
    expect(implementations.length).toBeGreaterThan(1);
    for (const family of ['linear', 'activatedLinear', 'linearBackwardInput', 'linearBackwardWeight', 'attention']) {
      expect(cases.some((name) => name.startsWith(family))).toBe(true);
    }
  });

  it('refuses a case that does not exist', () => {
    expect(spawnSync(suite, ['--case', 'none/float32']).status).toBe(2);
  });
});

describe.each(implementations)('%s gives the bits of the reference', (implementation) => {
  it.each(cases)('%s', (name) => {
    const run = spawnSync(suite, ['--implementation', implementation, '--case', name, '--seed', seed], {
      encoding: 'utf8',
    });
    expect(run.status, `${run.stdout}${run.stderr}${run.error ?? ''}`).toBe(0);
  });
});
