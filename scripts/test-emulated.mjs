#!/usr/bin/env node
// The long tests of the CUDA back end on a machine without a GPU (npm run test:emulated:all): every kernel contract in full,
// under AddressSanitizer, and the tests of the room gpu under every order of threads and every timing of streams. Goes on
// after a failure; exits 1 when something failed.
import { spawnSync } from 'node:child_process';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const vitest = join(root, 'node_modules', '.bin', 'vitest');
const failed = [];

function step(name, command, args, environment = {}) {
  const started = Date.now();
  process.stderr.write(`emulated: ${name}\n`);
  const { status, error } = spawnSync(command, args, {
    cwd: root,
    stdio: ['ignore', 'inherit', 'inherit'],
    env: { ...process.env, ...environment },
  });
  if (status !== 0) failed.push(name);
  const seconds = ((Date.now() - started) / 1000).toFixed(0);
  process.stderr.write(
    `emulated: ${status === 0 ? 'ok  ' : 'FAIL'} ${name} (${seconds} s)${error ? ` ${error.message}` : ''}\n`,
  );
  return status === 0;
}

if (step('build with sanitizers', process.execPath, ['scripts/build-native.mjs', '--sanitize', '--tests'])) {
  const suite = join(root, 'build-sanitize', 'Release', 'kernel_contracts');
  // The suite's own tables live as long as the process.
  const environment = { ASAN_OPTIONS: 'detect_leaks=0', UBSAN_OPTIONS: 'halt_on_error=1:print_stacktrace=1' };
  step('kernel contracts with sanitizers', suite, ['--implementation', 'cuda'], environment);
}
for (const schedule of ['forward', 'reverse', 'random']) {
  for (const timing of ['eager', 'lazy']) {
    step(`tests, ${schedule}, ${timing}`, vitest, ['run', '--project', 'gpu'], {
      LOCKSTEP_DEVICE: 'cuda-emulated',
      LOCKSTEP_TEST_ALL: '1',
      LOCKSTEP_EMULATION_SCHEDULE: schedule,
      LOCKSTEP_EMULATION_TIMING: timing,
    });
  }
}
process.stderr.write(failed.length === 0 ? 'emulated: all passed\n' : `emulated: failed: ${failed.join('; ')}\n`);
process.exit(failed.length === 0 ? 0 : 1);
