#!/usr/bin/env node
// The long tests of the CUDA back end on a machine without a GPU (npm run test:emulated:all): every kernel contract in full
// and every communicator contract, under AddressSanitizer and UndefinedBehaviorSanitizer, and the tests of the room gpu under
// every order of threads and every timing of streams. Goes on after a failure; exits 1 when something failed.
//   --list        what there is
//   --only TEXT   the steps whose name has TEXT
import { execFileSync, spawn } from 'node:child_process';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const vitest = join(root, 'node_modules', '.bin', 'vitest');
const contracts = join(root, 'build-sanitize-emulated', 'Release', 'kernel_contracts');
// The suite's own tables live as long as the process. Streams are as late as they may be, which finds what early ones find.
const sanitizers = {
  ASAN_OPTIONS: 'detect_leaks=0',
  UBSAN_OPTIONS: 'halt_on_error=1:print_stacktrace=1',
  LOCKSTEP_EMULATION_TIMING: 'lazy',
};

function say(text) {
  process.stderr.write(`emulated: ${text}\n`);
}

function inMinutes(seconds) {
  return seconds < 90 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;
}

/** Runs a program; what it writes is shown at once, or with `quiet` when it fails. Resolves to whether it went well. */
function run(command, args, environment = {}, quiet = false) {
  const child = spawn(command, args, {
    cwd: root,
    stdio: ['ignore', quiet ? 'pipe' : 'inherit', quiet ? 'pipe' : 'inherit'],
    env: { ...process.env, ...environment },
  });
  let output = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream?.setEncoding('utf8').on('data', (chunk) => {
      output += chunk;
    });
  }
  return new Promise((resolve) => {
    child.on('error', (error) => {
      say(error.message);
      resolve(false);
    });
    child.on('close', (status, signal) => {
      if (status !== 0 && quiet) process.stderr.write(`${output}${signal ? `ended by ${signal}\n` : ''}`);
      resolve(status === 0);
    });
  });
}

/** Runs one case after another of the contract suite, as many at a time as `jobs`. Resolves to whether all hold. */
async function runCases(list, flags, jobs) {
  const names = execFileSync(contracts, [list], { encoding: 'utf8', env: { ...process.env, ...sanitizers } })
    .split('\n')
    .filter((line) => line !== '');
  const broken = [];
  let next = 0;
  let done = 0;
  await Promise.all(
    Array.from({ length: jobs }, async () => {
      while (next < names.length) {
        const name = names[next++];
        const started = Date.now();
        const holds = await run(contracts, [...flags, '--case', name], sanitizers, true);
        if (!holds) broken.push(name);
        const seconds = ((Date.now() - started) / 1000).toFixed(1);
        say(`  ${++done} of ${names.length} ${holds ? 'ok  ' : 'FAIL'} ${name} (${seconds} s)`);
      }
    }),
  );
  if (broken.length > 0) say(`  broken: ${broken.join(', ')}`);
  return broken.length === 0;
}

const buildStep = {
  name: 'build with sanitizers',
  seconds: 600,
  run: () =>
    run(process.execPath, [
      'scripts/build-native.mjs',
      '--sanitize',
      'emulated',
      '--tests',
      '--only',
      'kernel_contracts',
    ]),
};

/** `seconds` is a guess, which the time of earlier steps corrects. Kernels and planted bugs see to every order by themselves. */
const steps = [
  buildStep,
  {
    name: 'kernel contracts with sanitizers',
    seconds: 900,
    sanitized: true,
    run: () => runCases('--list', ['--implementation', 'cuda'], availableParallelism()),
  },
  // Their ranks are threads, and they measure seconds: one case at a time.
  ...['local', 'nccl'].map((name) => ({
    name: `communicator contracts with sanitizers, ${name}`,
    seconds: 120,
    sanitized: true,
    run: () => runCases('--communicator-list', ['--communicator', name], 1),
  })),
  ...['forward', 'reverse', 'random'].flatMap((schedule) =>
    ['eager', 'lazy'].map((timing) => ({
      name: `tests, ${schedule}, ${timing}`,
      seconds: 240,
      run: () =>
        run(
          vitest,
          ['run', '--project', 'gpu', '--exclude', '**/kernels.test.ts', '--exclude', '**/planted-bugs.test.ts'],
          {
            LOCKSTEP_DEVICE: 'cuda-emulated',
            LOCKSTEP_TEST_ALL: '1',
            LOCKSTEP_EMULATION_SCHEDULE: schedule,
            LOCKSTEP_EMULATION_TIMING: timing,
          },
        ),
    })),
  ),
  {
    name: 'planted bugs',
    seconds: 30,
    run: () => run(vitest, ['run', '--project', 'gpu', 'planted-bugs'], { LOCKSTEP_DEVICE: 'cuda-emulated' }),
  },
];

const { values } = parseArgs({ options: { list: { type: 'boolean' }, only: { type: 'string', default: '' } } });
if (values.list) {
  for (const { name } of steps) process.stdout.write(`${name}\n`);
  process.exit(0);
}
const chosen = steps.filter(({ name }) => name.includes(values.only));
if (chosen.length === 0) {
  say(`no step has '${values.only}' in its name; --list prints them`);
  process.exit(2);
}

const failed = [];
// How much longer steps take here than they say; a build may have nothing to do, so it tells nothing.
let expected = 0;
let taken = 0;
for (const [i, step] of chosen.entries()) {
  if (step.sanitized && failed.includes(buildStep.name)) continue;
  const pace = expected > 0 ? taken / expected : 1;
  const left = chosen.slice(i).reduce((sum, { seconds }) => sum + seconds, 0);
  const about = `about ${inMinutes(step.seconds * pace)}, all that is left ${inMinutes(left * pace)}`;
  say(`${i + 1} of ${chosen.length}: ${step.name} (${about})`);
  const started = Date.now();
  const ok = await step.run();
  const seconds = (Date.now() - started) / 1000;
  if (!ok) failed.push(step.name);
  if (step !== buildStep) {
    expected += step.seconds;
    taken += seconds;
  }
  say(`${ok ? 'ok  ' : 'FAIL'} ${step.name} (${seconds.toFixed(0)} s)`);
}
say(failed.length === 0 ? 'all passed' : `failed: ${failed.join('; ')}`);
process.exit(failed.length === 0 ? 0 : 1);
