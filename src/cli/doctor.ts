/** `lockstep doctor`: whether this machine can run Lockstep, and with what. */
import { readFileSync } from 'node:fs';
import { availableParallelism, cpus, freemem, totalmem } from 'node:os';
import { join } from 'node:path';
import { type CudaStatus, loadNative, nativeLocation, nativePaths, requestedInstructionSet } from '../engine/native.js';
import type { Command, Input, Session } from './command.js';
import { packageRoot, packageVersion } from './package.js';
import { formatBytes } from './progress.js';

export const doctorCommand: Command = {
  name: 'doctor',
  summary: 'check this machine: CPU, memory, native addon',
  words: [],
  flags: { json: { help: 'Print the findings as one JSON object' } },
  notes: [
    'Exit code 0 when models can run here, 1 when something is missing. LOCKSTEP_ISA=avx2|avx512|avx512-bf16 forces an ' +
      'instruction set, LOCKSTEP_NATIVE_PATH names an addon.',
  ],
  examples: ['lockstep doctor', 'LOCKSTEP_ISA=avx2 lockstep doctor --json'],
  run,
};

export interface Diagnosis {
  version: string;
  node: string;
  platform: string;
  cpu: { model: string; cores: number; features: string[] };
  memory: { totalBytes: number; freeBytes: number };
  native: { path: string | null; tried: string[]; buildCommand: string };
  /** `usable`: name, and whether it passes its self-check or why it does not run. */
  instructionSet: { requested: string; chosen: string | null; usable: Record<string, string> };
  /** Of the addon: whether it was built with CUDA, why no GPU can be used, and those that there are. */
  gpu: CudaStatus | null;
  /** What keeps models from running; empty when nothing does. */
  problems: string[];
}

const instructionSets = ['avx2', 'avx512', 'avx512-bf16'];
const relevantFeatures = /^(avx|avx2|fma|f16c|avx512(f|bw|dq|vl)|avx512_bf16|avx512_fp16|amx_bf16)$/;

export function diagnose(): Diagnosis {
  const problems: string[] = [];
  const attempt = <T>(work: () => T): T | undefined => {
    try {
      return work();
    } catch (error) {
      problems.push((error as Error).message);
      return undefined;
    }
  };
  const requested = process.env.LOCKSTEP_ISA ?? '';
  const location = attempt(nativeLocation);
  const wanted = attempt(requestedInstructionSet);
  const chosen = location && wanted !== undefined && attempt(() => loadNative().instructionSet(wanted));
  return {
    version: packageVersion(),
    node: process.versions.node,
    platform: `${process.platform} ${process.arch}`,
    cpu: { model: cpus()[0]?.model.trim() ?? 'unknown', cores: availableParallelism(), features: cpuFeatures() },
    memory: { totalBytes: Math.min(totalmem(), memoryLimit()), freeBytes: freemem() },
    native: {
      path: location?.path ?? null,
      tried: nativePaths(),
      buildCommand: `node ${join(packageRoot, 'scripts', 'build-native.mjs')}`,
    },
    instructionSet: {
      requested,
      chosen: chosen || null,
      usable: location ? Object.fromEntries(instructionSets.map((name) => [name, selfCheck(name)])) : {},
    },
    gpu: location ? loadNative().cuda() : null,
    problems,
  };
}

function selfCheck(name: string): string {
  try {
    loadNative().instructionSet(name);
    return 'passes its self-check';
  } catch (error) {
    return (error as Error).message;
  }
}

function cpuFeatures(): string[] {
  try {
    const line = /^flags\s*:\s*(.*)$/m.exec(readFileSync('/proc/cpuinfo', 'utf8'))?.[1] ?? '';
    return line.split(/\s+/).filter((feature) => relevantFeatures.test(feature));
  } catch {
    return [];
  }
}

/** A container's limit, when there is one. */
function memoryLimit(): number {
  const limit = process.constrainedMemory?.() ?? 0;
  return limit > 0 ? limit : Number.POSITIVE_INFINITY;
}

async function run(input: Input, { terminal }: Session): Promise<number> {
  const diagnosis = diagnose();
  if (input.switches.has('json')) terminal.print(JSON.stringify(diagnosis));
  else terminal.print(describe(diagnosis).join('\n'));
  return diagnosis.problems.length === 0 ? 0 : 1;
}

const version = (cuda: number): string => `${Math.floor(cuda / 1000)}.${Math.floor((cuda % 1000) / 10)}`;

function describeGpu(gpu: CudaStatus | null): string[] {
  if (gpu === null) return ['gpu           unknown: the addon is not loaded'];
  const cuda =
    gpu.build === 'none' ? 'not built' : `${version(gpu.runtime)}${gpu.build === 'emulated' ? ', emulated' : ''}`;
  return [
    `cuda          ${cuda}${gpu.driver > 0 ? `; the driver is for ${version(gpu.driver)}` : ''}`,
    ...gpu.gpus.map(
      ({ name, major, minor, memoryBytes }, i) =>
        `gpu ${i}         ${name}, ${formatBytes(memoryBytes)}, compute capability ${major}.${minor}`,
    ),
    ...(gpu.problem === '' ? [] : [`gpu           none used: ${gpu.problem}`]),
  ];
}

function describe({
  version,
  node,
  platform,
  cpu,
  memory,
  native,
  instructionSet,
  gpu,
  problems,
}: Diagnosis): string[] {
  const usable = Object.entries(instructionSet.usable).map(([name, state]) => `  ${name.padEnd(12)} ${state}`);
  const request = instructionSet.requested ? ` (LOCKSTEP_ISA=${instructionSet.requested})` : '';
  return [
    `lockstep      ${version}, Node.js ${node}, ${platform}`,
    `cpu           ${cpu.model}, ${cpu.cores} cores`,
    `features      ${cpu.features.join(' ') || 'unknown'}`,
    `memory        ${formatBytes(memory.totalBytes)}, ${formatBytes(memory.freeBytes)} free`,
    ...describeGpu(gpu),
    `addon         ${native.path ?? 'not loaded'}`,
    `kernels       ${instructionSet.chosen ?? 'none'}${request}`,
    ...usable,
    ...(problems.length === 0 ? ['ready'] : problems.map((problem) => `problem: ${problem}`)),
  ];
}
