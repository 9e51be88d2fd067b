#!/usr/bin/env node
// Builds the addon with CMake: native/ -> build/Release/lockstep.node. Incremental; progress goes to stderr.
//   --tests       also builds the kernel contract suite, build/Release/kernel_contracts, and the addon with GPUs emulated
//   --cuda [auto|on|off]
//                 with the CUDA back end: where nvcc of CUDA 13 is found (auto, the default), always (on, or no word), never
//   --only NAME   this target of native/CMakeLists.txt alone; may be repeated. Programs take no Node-API headers, so no npm ci.
//   --sanitize [all|emulated]
//                 AddressSanitizer and UndefinedBehaviorSanitizer, in build-sanitize/ instead of build/: of everything, or of all but
//                 the CPU's fast kernels (which take most of the time), in build-sanitize-emulated/
//   --jobs N      compilers at a time (default: one per core)
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { availableParallelism } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { findNvcc } from './cuda.mjs';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const minimumCmake = [3, 18];

function say(text) {
  process.stderr.write(`native: ${text}\n`);
}

/** Ends the build with a message that says what to do. */
function refuse(text) {
  say(text);
  process.exit(1);
}

const cudaWords = ['auto', 'on', 'off'];
const sanitizeWords = ['all', 'emulated'];
/** Targets that take the headers of Node-API. */
const addons = ['lockstep', 'lockstep_emulated'];

function parseFlags() {
  const given = process.argv.slice(2);
  const alone = (word, i, flag, words) => word === flag && !words.includes(given[i + 1]);
  const args = given.map((word, i) =>
    alone(word, i, '--cuda', cudaWords)
      ? '--cuda=on'
      : alone(word, i, '--sanitize', sanitizeWords)
        ? '--sanitize=all'
        : word,
  );
  const known = 'flags: --tests, --cuda [auto|on|off], --only NAME, --sanitize [all|emulated], --jobs N';
  try {
    const { values } = parseArgs({
      args,
      options: {
        tests: { type: 'boolean', default: false },
        cuda: { type: 'string', default: 'auto' },
        only: { type: 'string', multiple: true },
        sanitize: { type: 'string' },
        jobs: { type: 'string' },
      },
    });
    if (!cudaWords.includes(values.cuda)) return refuse(`--cuda ${values.cuda}: expected auto, on or off (${known})`);
    if (values.sanitize !== undefined && !sanitizeWords.includes(values.sanitize)) {
      return refuse(`--sanitize ${values.sanitize}: expected all or emulated (${known})`);
    }
    return values;
  } catch (error) {
    return refuse(`${error.message} (${known})`);
  }
}

const flags = parseFlags();

function version(command, args = ['--version']) {
  const result = spawnSync(command, args, { encoding: 'utf8' });
  return result.status === 0 ? (/(\d+)\.(\d+)(\.\d+)?/.exec(result.stdout)?.[0] ?? 'unknown') : undefined;
}

function howToInstall(apt, dnf) {
  return `install it with\n  sudo apt-get install -y ${apt}      (Debian, Ubuntu)\n  sudo dnf install -y ${dnf}      (Fedora, RHEL)`;
}

function findCmake() {
  const found = version('cmake');
  const needed = minimumCmake.join('.');
  if (found === undefined) refuse(`cmake is missing (${needed} or newer is needed); ${howToInstall('cmake', 'cmake')}`);
  const [major, minor] = found.split('.').map(Number);
  if (major < minimumCmake[0] || (major === minimumCmake[0] && minor < minimumCmake[1])) {
    refuse(`cmake ${found} is too old (${needed} or newer is needed); ${howToInstall('cmake', 'cmake')}`);
  }
  return found;
}

const cxx20Probe =
  '#include <bit>\n#include <concepts>\n#include <span>\nstatic_assert(std::endian::native == std::endian::little);\nint main() {}\n';

function findCompiler() {
  const candidates = process.env.CXX ? [process.env.CXX] : ['c++', 'g++', 'clang++'];
  const present = candidates.filter((name) => version(name) !== undefined);
  if (present.length === 0) {
    refuse(`no C++ compiler (tried ${candidates.join(', ')}); ${howToInstall('g++', 'gcc-c++')}`);
  }
  const accepts = (name) =>
    spawnSync(name, ['-std=c++20', '-x', 'c++', '-fsyntax-only', '-'], { input: cxx20Probe }).status === 0;
  const compiler = present.find(accepts);
  if (compiler === undefined) {
    const list = present.map((name) => `${name} ${version(name)}`).join(', ');
    refuse(`${list}: does not compile C++20 (g++ 10, clang 12 or newer does); ${howToInstall('g++', 'gcc-c++')}`);
  }
  return compiler;
}

function findGenerator() {
  if (version('ninja') !== undefined) return 'Ninja';
  if (version('make') !== undefined) return 'Unix Makefiles';
  return refuse(`neither ninja nor make is installed; ${howToInstall('ninja-build', 'ninja-build')}`);
}

/** Of Node-API. Without them those of an earlier build, or none, will do for what is no addon. */
function includeDirectories(previous) {
  const require = createRequire(import.meta.url);
  try {
    return [require('node-api-headers').include_dir, dirname(require.resolve('node-addon-api/package.json'))];
  } catch (error) {
    if (flags.only?.every((name) => !addons.includes(name))) return previous?.include ?? [];
    return refuse(`the Node-API headers are not installed (${error.message.split('\n')[0]}); run npm ci first`);
  }
}

/** nvcc, its version, and whether NVTX is there, or undefined; says why when it is not used. */
function findCuda(previous) {
  // Memory errors of kernels are found in the emulation; a sanitized addon with CUDA has to be asked for.
  if (flags.cuda === 'off' || (flags.cuda === 'auto' && flags.sanitize)) return undefined;
  let found = findNvcc();
  // A tree that was built with CUDA stays so.
  if (found.problem && !process.env.LOCKSTEP_NVCC && previous?.cuda) {
    found = findNvcc({ LOCKSTEP_NVCC: previous.cuda.nvcc });
  }
  if (found.problem === undefined) return found;
  if (flags.cuda === 'on') {
    refuse(
      `${found.problem}.\nInstall the CUDA toolkit 13.0 and set CUDA_PATH to its root; without root rights:\n` +
        '  python3 -m venv cuda && cuda/bin/pip install "cuda-toolkit[nvcc,cudart,cccl,nvtx]==13.0.*"\n' +
        '  export CUDA_PATH=$(echo $PWD/cuda/lib/python3*/site-packages/nvidia/cu13)\n' +
        'or build for the CPU only: --cuda off',
    );
  }
  if (previous === undefined || previous.cuda) say(`without CUDA: ${found.problem}; --cuda says what to do`);
  return undefined;
}

/** Configures when this tree has never been configured, or was configured with other settings. */
function configure(tree, output) {
  const record = join(tree, 'lockstep-settings.json');
  let previous = existsSync(record) ? JSON.parse(readFileSync(record, 'utf8')) : undefined;
  // A plain build keeps the test suite configured: switching back and forth would recompile nothing but costs a configure.
  const tests = flags.tests || previous?.tests === true;
  const cuda = findCuda(previous) ?? null;
  const cxx = process.env.CXX ?? '';
  const settings = { root, include: includeDirectories(previous), sanitize: flags.sanitize ?? false, cxx, tests, cuda };
  if (previous !== undefined && JSON.stringify(previous) === JSON.stringify(settings)) return settings;
  // CMake keeps a tree's folders and compilers: when those change, or a first configure was cut short, it begins anew.
  // Tests can come and go, CUDA and the headers of Node-API can come.
  const include = previous?.include.length ? previous.include : settings.include;
  const kept = previous && { ...previous, include, tests, cuda: previous.cuda ?? cuda };
  if (JSON.stringify(kept) !== JSON.stringify(settings)) {
    rmSync(tree, { recursive: true, force: true });
    previous = undefined;
  }

  const cmake = findCmake();
  const compiler = findCompiler();
  const generator = previous === undefined ? findGenerator() : undefined;
  const tools = [`cmake ${cmake}`, `${compiler} ${version(compiler)}`, generator, cuda && `CUDA ${cuda.version}`];
  say(`configuring (${tools.filter(Boolean).join(', ')})`);
  if (cuda && !cuda.nvtx)
    say('without NVTX ranges: this CUDA has no nvtx3/nvToolsExt.h (from PyPI: nvidia-nvtx==13.0.*)');
  mkdirSync(tree, { recursive: true });
  const result = spawnSync(
    'cmake',
    [
      ...['-S', join(root, 'native'), '-B', tree, '-DCMAKE_BUILD_TYPE=Release', `-DCMAKE_CXX_COMPILER=${compiler}`],
      ...(generator ? ['-G', generator] : []),
      `-DLOCKSTEP_NODE_INCLUDE=${settings.include.join(';')}`,
      `-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=${output}`,
      `-DCMAKE_RUNTIME_OUTPUT_DIRECTORY=${output}`,
      `-DLOCKSTEP_TESTS=${tests ? 'ON' : 'OFF'}`,
      `-DLOCKSTEP_SANITIZE=${flags.sanitize ?? 'OFF'}`,
      `-DLOCKSTEP_NVCC=${cuda?.nvcc ?? ''}`,
    ],
    { encoding: 'utf8' },
  );
  if (result.status !== 0) {
    process.stderr.write(result.stdout + result.stderr);
    refuse(
      `cmake could not configure ${tree} (output above); after a change of tools, delete that folder and try again` +
        (cuda ? ', or build without CUDA: --cuda off' : ''),
    );
  }
  writeFileSync(record, JSON.stringify(settings));
  return settings;
}

/** Reports a build's progress: one line that renews itself on a terminal, a line per tenth elsewhere. */
function progressReporter() {
  const live = process.stderr.isTTY === true;
  let shownTenth = -1;
  return {
    step(fraction, label) {
      if (live) {
        process.stderr.write(
          `\r\x1b[Knative: compiling ${Math.round(fraction * 100)}%  ${label}`.slice(
            0,
            (process.stderr.columns ?? 80) + 4,
          ),
        );
      } else if (Math.floor(fraction * 10) > shownTenth) {
        shownTenth = Math.floor(fraction * 10);
        say(`compiling ${Math.round(fraction * 100)}%`);
      }
    },
    end() {
      if (live) process.stderr.write('\r\x1b[K');
    },
  };
}

function build(tree, targets) {
  const jobs = flags.jobs ?? String(availableParallelism());
  const child = spawn('cmake', ['--build', tree, '--target', ...targets, '--parallel', jobs], {
    env: { ...process.env, NINJA_STATUS: '[%f/%t] ' },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  const progress = progressReporter();
  const messages = [];
  let rest = '';
  const line = (text) => {
    const ninja = /^\[(\d+)\/(\d+)\] (.*)$/.exec(text);
    const make = /^\[\s*(\d+)%\] (.*)$/.exec(text);
    if (ninja) progress.step(Number(ninja[1]) / Number(ninja[2]), ninja[3].split(' ').at(-1).split('/').at(-1));
    else if (make) progress.step(Number(make[1]) / 100, make[2].split('/').at(-1));
    else if (text.trim() !== '' && !text.startsWith('ninja: no work')) messages.push(text);
  };
  const feed = (chunk) => {
    const lines = (rest + chunk).split('\n');
    rest = lines.pop();
    lines.forEach(line);
  };
  child.stdout.setEncoding('utf8').on('data', feed);
  child.stderr.setEncoding('utf8').on('data', feed);
  return new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code) => {
      progress.end();
      const failed = code !== 0;
      const warnings = messages.some((text) => /\b(warning|error):/.test(text));
      if (failed || warnings) process.stderr.write(`${messages.join('\n')}\n`);
      resolve(!failed);
    });
  });
}

if (process.platform !== 'linux' || process.arch !== 'x64') {
  refuse(
    `this version of Lockstep runs on Linux x86-64 only; this is ${process.platform} ${process.arch}. ` +
      'Use a Linux x86-64 machine, container or virtual machine.',
  );
}
const started = Date.now();
const trees = { all: 'build-sanitize', emulated: 'build-sanitize-emulated' };
const base = join(root, trees[flags.sanitize] ?? 'build');
const output = join(base, 'Release');
const { cuda } = configure(join(base, 'cmake'), output);
const targets = ['lockstep'];
if (flags.tests) targets.push('lockstep_emulated', 'kernel_contracts', 'mma_layout', 'emulation_faults');
if (flags.tests && cuda) targets.push('kernel_contracts_gpu', 'mma_layout_gpu');
const built = flags.only?.join(', ') ?? 'lockstep.node';
if (!(await build(join(base, 'cmake'), flags.only ?? targets))) refuse('the build failed (compiler output above)');
const seconds = ((Date.now() - started) / 1000).toFixed(1);
say(`ready in ${seconds} s: ${join(output, built)}${cuda ? `, with CUDA ${cuda.version}` : ''}`);
