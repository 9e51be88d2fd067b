// Every implementation of the communicator keeps its contract: right bytes, the bits of one tree, and an error on every
// rank, within a second, whatever one of them does. One test per case of the native suite and implementation.
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';

const suite = process.env.LOCKSTEP_KERNEL_CONTRACTS ?? join(process.cwd(), 'build', 'Release', 'kernel_contracts');
const seed = process.env.LOCKSTEP_CONTRACTS_SEED ?? '1';

function lines(flag: string): string[] {
  if (!existsSync(suite)) return [];
  return execFileSync(suite, [flag], { encoding: 'utf8' })
    .split('\n')
    .filter((line) => line !== '');
}

const cases = lines('--communicator-list');
const implementations = lines('--communicators');

function run(implementation: string, name: string) {
  return spawnSync(suite, ['--communicator', implementation, '--case', name, '--seed', seed], { encoding: 'utf8' });
}

describe('the communicator contract suite', () => {
  it('is built', () => {
    expect(existsSync(suite), `${suite} is missing: run npm run build -- --tests`).toBe(true);
  });

  it('knows ranks of one process, correct programs and every kind of fault', () => {
    expect(implementations).toContain('local');
    expect(cases).toEqual(
      expect.arrayContaining(['programs', 'tree', 'shares', 'traffic', 'twoThreads', 'background.overlap', 'progress']),
    );
    for (const fault of ['throw', 'abort', 'otherCall', 'otherMessage', 'silent', 'skip', 'leave', 'crossed']) {
      expect(cases).toContain(`faults.${fault}`);
    }
  });

  it('refuses a case or an implementation that does not exist', () => {
    expect(run('local', 'none').status).toBe(2);
    expect(run('none', 'tree').status).toBe(2);
  });
});

describe.each(implementations)('%s ranks', (implementation) => {
  it.each(cases)('%s', (name) => {
    const { status, stdout, stderr, error } = run(implementation, name);
    expect(status, `${stdout}${stderr}${error ?? ''}`).toBe(0);
  });
});
