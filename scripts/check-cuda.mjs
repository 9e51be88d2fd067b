#!/usr/bin/env node
// Looks into the compiled CUDA kernels of a build: every architecture is there, no kernel spills registers or uses the
// stack, and the products and attention of bfloat16 run on tensor cores (HMMA). Prints a table, and exits 1 with what is
// wrong. Needs cuobjdump and nvdisasm of CUDA 13, beside nvcc or on PATH; no GPU.
//   --tree DIR    the CMake tree (default: build/cmake)
import { execFile } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { basename, delimiter, dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs, promisify } from 'node:util';
import { findCudaTool } from './cuda.mjs';

const root = dirname(dirname(fileURLToPath(import.meta.url)));

/** The kernels that multiply matrices of bfloat16, by source file. Each instance must use tensor cores. */
const onTensorCores = {
  'attention.cu': ['tileKernel'],
  'attention_few.cu': ['scoreKernel', 'chainKernel'],
  'attention_backward.cu': ['queryGradientKernel', 'keyValueGradientKernel'],
  'linear.cu': ['productKernel'],
  'linear_backward.cu': ['inputKernel', 'weightKernel'],
};

function refuse(text) {
  process.stderr.write(`check-cuda: ${text}\n`);
  process.exit(1);
}

const { tree = join(root, 'build', 'cmake') } = parseArgs({ options: { tree: { type: 'string' } } }).values;

function cached(name) {
  const cache = join(tree, 'CMakeCache.txt');
  if (!existsSync(cache)) refuse(`${cache} is missing: run npm run build:native -- --cuda`);
  return new RegExp(`^${name}(?::[A-Z]+)?=(.*)$`, 'm').exec(readFileSync(cache, 'utf8'))?.[1] ?? '';
}

const nvcc = cached('LOCKSTEP_NVCC');
if (nvcc === '') refuse(`${tree} was configured without CUDA: run npm run build:native -- --cuda`);
const wanted = cached('LOCKSTEP_CUDA_ARCHITECTURES').split(';');

function tool(name, wheel) {
  const found = findCudaTool(name, nvcc);
  return found ?? refuse(`no ${name}: install it beside ${nvcc} (${wheel} on PyPI), or set CUDA_PATH`);
}
const cuobjdump = tool('cuobjdump', 'nvidia-cuda-cuobjdump');
const nvdisasm = tool('nvdisasm', 'nvidia-cuda-nvdisasm');

async function run(command, args) {
  const path = [dirname(nvdisasm), process.env.PATH].join(delimiter);
  const options = { encoding: 'utf8', maxBuffer: 1 << 30, env: { ...process.env, PATH: path } };
  return (await promisify(execFile)(command, args, options)).stdout;
}

/** The lines of cuobjdump's output, in sections that begin with "Fatbin elf code:" and name an architecture. */
function* sections(text) {
  for (const section of text.split(/^Fatbin /m).slice(1)) {
    const arch = /^arch = (\S+)$/m.exec(section)?.[1];
    if (section.startsWith('elf') && arch) yield { arch, lines: section.split('\n') };
  }
}

/** `outer::(anonymous namespace)::kernel<2, true>(int)` -> `kernel<2, true>`. */
function shortName(name) {
  const plain = name.replaceAll('(anonymous namespace)::', '').replace(/^void /, '');
  const end = plain.indexOf('(');
  return (end < 0 ? plain : plain.slice(0, end))
    .replace(/(\w+::)+(?=\w)/g, '')
    .replace(/\(\w+\)/g, '')
    .replaceAll('> >', '>>');
}

async function demangle(names) {
  if (names.length === 0) return new Map();
  try {
    const lines = (await run('c++filt', names)).trimEnd().split('\n');
    return new Map(names.map((name, i) => [name, shortName(lines[i])]));
  } catch {
    return new Map(names.map((name) => [name, name]));
  }
}

async function inspect(object) {
  const source = basename(object).replace(/\.(o|obj)$/, '');
  const resources = await run(cuobjdump, ['--dump-resource-usage', object]);
  const kernels = new Map();
  const cubins = new Set();
  for (const { arch, lines } of sections(resources)) {
    cubins.add(arch);
    for (const [i, line] of lines.entries()) {
      const mangled = /^\s*Function (\S+):$/.exec(line)?.[1];
      if (mangled === undefined) continue;
      const number = (key) => Number(new RegExp(`\\b${key}:(\\d+)`).exec(lines[i + 1])?.[1] ?? Number.NaN);
      kernels.set(`${arch} ${mangled}`, {
        ...{ source, arch, mangled, hmma: 0, registers: number('REG'), shared: number('SHARED') },
        ...{ stack: number('STACK'), local: number('LOCAL'), spills: 0 },
      });
    }
  }
  for (const { arch, lines } of sections(kernels.size === 0 ? '' : await run(cuobjdump, ['-sass', object]))) {
    let kernel;
    for (const line of lines) {
      const mangled = /^\s*Function : (\S+)$/.exec(line)?.[1];
      if (mangled !== undefined) kernel = kernels.get(`${arch} ${mangled}`);
      else if (kernel && /\bHMMA\b/.test(line)) kernel.hmma += 1;
      else if (kernel && /\b(STL|LDL)\b/.test(line)) kernel.spills += 1;
    }
  }
  const names = await demangle([...new Set([...kernels.values()].map(({ mangled }) => mangled))]);
  for (const kernel of kernels.values()) kernel.name = names.get(kernel.mangled);
  const listed = await run(cuobjdump, ['--list-ptx', object]).catch(() => '');
  const ptx = [...listed.matchAll(/\.(sm_\w+)\.ptx/g)].map((match) => match[1]);
  return { source, cubins, ptx, kernels: [...kernels.values()] };
}

function problemsOf({ source, cubins, ptx, kernels }) {
  const problems = [];
  if (kernels.length === 0) return problems; // host code alone
  for (const name of wanted) {
    const arch = `sm_${name.replace(/-.*$/, '')}`;
    if (!name.endsWith('-virtual') && !cubins.has(arch)) problems.push(`${source}: no code for ${arch}`);
    if (!name.endsWith('-real') && !ptx.includes(arch)) problems.push(`${source}: no PTX for ${arch}`);
  }
  for (const { name, arch, registers, stack, local, spills } of kernels) {
    if (Number.isNaN(registers + stack + local))
      problems.push(`${source}: ${name} (${arch}): cuobjdump tells too little`);
    if (stack > 0 || local > 0 || spills > 0) {
      problems.push(
        `${source}: ${name} (${arch}): ${stack} bytes of stack, ${local} of local memory, ` +
          `${spills} loads and stores of them; registers spill, or an array is indexed at run time`,
      );
    }
  }
  for (const expected of onTensorCores[source] ?? []) {
    const instances = kernels.filter(({ name }) => name.replace(/<.*$/, '') === expected);
    if (instances.length === 0) problems.push(`${source}: no kernel ${expected}, which scripts/check-cuda.mjs names`);
    for (const { name, arch, hmma } of instances) {
      if (hmma === 0) problems.push(`${source}: ${name} (${arch}): no HMMA; it does not use tensor cores`);
    }
  }
  return problems;
}

const folder = join(tree, 'CMakeFiles', 'cuda_hardware.dir', 'kernels', 'cuda');
const objects = existsSync(folder) ? readdirSync(folder).filter((name) => name.endsWith('.cu.o')) : [];
if (objects.length === 0)
  refuse(`no compiled kernels in ${relative(process.cwd(), folder)}: run npm run build:native -- --cuda`);
const results = new Array(objects.length);
let next = 0;
const work = async () => {
  for (let i = next++; i < objects.length; i = next++) results[i] = await inspect(join(folder, objects[i]));
};
await Promise.all(Array.from({ length: Math.min(objects.length, availableParallelism()) }, work));

const rows = results.flatMap(({ kernels }) => kernels);
rows.sort((a, b) => a.source.localeCompare(b.source) || a.name.localeCompare(b.name) || a.arch.localeCompare(b.arch));
const width = Math.min(70, Math.max(...rows.map(({ name }) => name.length), 6));
const cells = (kernel, arch, ...numbers) =>
  [kernel.slice(0, width).padEnd(width), arch.padEnd(6), ...numbers.map((n) => String(n).padStart(9))].join(' ');
let file = '';
process.stdout.write(`${cells('kernel', 'arch', 'registers', 'shared', 'stack', 'HMMA')}\n`);
for (const { source, name, arch, registers, shared, stack, hmma } of rows) {
  if (source !== file) process.stdout.write(`${source}\n`);
  file = source;
  process.stdout.write(`${cells(name, arch, registers, shared, stack, hmma)}\n`);
}
const missing = Object.keys(onTensorCores).filter((name) => !results.some(({ source }) => source === name));
const problems = [
  ...missing.map((name) => `${name}: not compiled, and scripts/check-cuda.mjs names it`),
  ...results.flatMap(problemsOf),
];
for (const problem of problems) process.stdout.write(`WRONG ${problem}\n`);
process.stdout.write(`check-cuda: ${rows.length} kernels in ${objects.length} files for ${wanted.join(', ')}, `);
process.stdout.write(problems.length === 0 ? 'nothing wrong\n' : `${problems.length} wrong\n`);
process.exit(problems.length === 0 ? 0 : 1);
