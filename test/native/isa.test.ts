/** LOCKSTEP_ISA chooses kernels when a device is created; what cannot be honoured is an error. */
import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { createDevice } from '../../src/checkpoints/load-model.js';
import { LockstepError } from '../../src/errors.js';
import { instructionSets, withIsa } from './support.js';

const flags = new Set(/^flags\s*:\s*(.*)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1]?.split(' '));
/** Flags of /proc/cpuinfo without which an instruction set cannot be. */
const needs: Record<string, string[]> = {
  avx2: ['avx2', 'fma'],
  avx512: ['avx512f', 'avx512bw', 'avx512dq', 'avx512vl'],
  'avx512-bf16': ['avx512f', 'avx512_bf16'],
};
const lacking = (isa: string) => needs[isa]!.filter((flag) => !flags.has(flag));

function failure(run: () => unknown): LockstepError {
  try {
    run();
  } catch (error) {
    if (LockstepError.isInstance(error)) return error;
    throw error;
  }
  throw new Error('expected an error');
}

async function kernelsFor(isa: string, implementation?: 'reference'): Promise<string> {
  await using device = withIsa(isa, () => createDevice({ threads: 1, ...(implementation && { implementation }) }));
  return device.kernels;
}

describe.each(Object.keys(needs))('LOCKSTEP_ISA=%s', (isa) => {
  if (lacking(isa).length > 0) {
    test('is refused by a CPU without it, with what it lacks', () => {
      const error = failure(() => withIsa(isa, () => createDevice({ threads: 1 })));
      expect(error.code).toBe('ISA_UNSUPPORTED');
      expect(error.message).toContain(`LOCKSTEP_ISA=${isa}`);
      expect(error.message).toMatch(/this CPU lacks \S/);
      expect(error.message.toLowerCase().replaceAll(/[^a-z0-9]/g, '')).toContain(lacking(isa)[0]!.replace('_', ''));
      expect(instructionSets()).not.toContain(isa);
    });
  } else {
    test('runs its kernels', async () => {
      expect(await kernelsFor(isa)).toBe(isa);
      expect(instructionSets()).toContain(isa);
    });
  }
});

test('unset, the best set of the CPU runs', async () => {
  expect(await kernelsFor('')).toBe(instructionSets().at(-1));
});

test('the reference is the same everywhere', async () => {
  expect(await kernelsFor('avx2', 'reference')).toBe('reference');
});

test.each(['sse4', 'AVX2', 'avx512bf16', ' avx2'])('an unknown name is refused: %j', (isa) => {
  const error = failure(() => withIsa(isa, () => createDevice({ threads: 1 })));
  expect(error.code).toBe('ISA_INVALID');
  expect(error.message).toContain(`'${isa}'`);
  expect(error.message).toContain('avx2, avx512 or avx512-bf16');
});

test.each([0, -1, 1.5, 257, Number.NaN])('threads: %s is refused', (threads) => {
  const error = failure(() => createDevice({ threads }));
  expect(error.code).toBe('THREADS_INVALID');
  expect(error.message).toContain(String(threads));
});
