// The emulation of GPUs finds the bugs that it is there to find: each is planted in a kernel, or in how the host uses
// streams and memory, beside its correct form (test/native/emulation). The correct form must be right under every order
// of threads, copies and streams, and the broken one must be found.
import { spawnSync } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { testWhere } from '../conditions.js';

const program = join(process.cwd(), 'build', 'Release', 'emulation_faults');
const protectionKeys = /^flags\s*:.*\bospke\b/m.test(readFileSync('/proc/cpuinfo', 'utf8'));

/** Faults, and what the report of each must say. */
const faults: Readonly<Record<string, RegExp>> = {
  'read-before-written': /a wrong result/,
  'overwritten-before-read-on-the-left': /a wrong result/,
  'overwritten-before-read-on-the-right': /a wrong result/,
  'copy-read-too-early': /a wrong result/,
  'copy-overwrites-too-early': /a wrong result/,
  'blocks-share-scratch': /a wrong result/,
  'barriers-of-two-lines': /divergent __syncthreads, others at line \d+\n.*thread_faults\.cpp:\d+/,
  'barrier-of-some-threads': /threads wait for ever:\n.*__syncthreads at .*thread_faults\.cpp:\d+/,
  'lane-outside-its-mask': /a lane is not in its own mask:\n.*thread_faults\.cpp:\d+/,
  'mask-of-absent-lanes': /threads wait for ever:\n.*__shfl_xor_sync at .*thread_faults\.cpp:\d+/,
  'shuffle-from-outside-the-mask': /a wrong result/,
  'lanes-in-two-operations': /others in __shfl_\w+\n.*thread_faults\.cpp:\d+/,
  'fragment-in-the-wrong-order': /a wrong result/,
  'device-memory-not-initialised': /a wrong result/,
  'misaligned-copy': /misaligned address/,
  'too-much-shared-memory': /invalid configuration/,
  'too-many-threads': /invalid configuration/,
  'pages-given-back-in-part': /invalid argument/,
  'addresses-given-back-in-part': /invalid argument/,
  'host-reads-device-memory': /SIGSEGV/,
  'host-writes-device-memory': /SIGSEGV/,
  'write-out-of-bounds': /heap-buffer-overflow/,
  'shared-memory-out-of-bounds': /heap-buffer-overflow/,
  'copy-out-of-bounds': /heap-buffer-overflow/,
  'event-not-awaited': /lazy: a wrong result/,
  'event-recorded-too-early': /lazy: a wrong result/,
  'overwritten-by-another-stream': /lazy: a wrong result/,
  'host-does-not-wait': /lazy: a wrong result/,
  'source-changed-too-early': /lazy: a wrong result/,
  'waits-for-the-gpu-while-capturing': /previous error during capture/,
};

function run(...args: string[]) {
  const { status, stdout, stderr, error } = spawnSync(program, args, { encoding: 'utf8', maxBuffer: 64 << 20 });
  return { status, output: `${stdout}${stderr}${error ?? ''}` };
}

describe('planted bugs', () => {
  it('are built, and each is listed here', () => {
    expect(existsSync(program), `${program} is missing: run npm run build -- --tests`).toBe(true);
    expect(run('--list').output.trim().split('\n')).toEqual(Object.keys(faults));
    expect(run('no-such-fault').status).toBe(2);
  });

  for (const [name, found] of Object.entries(faults)) {
    const guarded = name.startsWith('host-') && name.endsWith('-device-memory');
    testWhere(!guarded || protectionKeys, 'this CPU, or its kernel, has no protection keys')(name, () => {
      const { status, output } = run(name);
      expect(status, output).toBe(0);
      expect(output).toMatch(found);
    });
  }
});
