/** `lockstep bench`: measurements of bench/, one JSON line each. They are part of the repository, not of the package. */
import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { cpus } from 'node:os';
import { join } from 'node:path';
import { LockstepError, nearest } from '../errors.js';
import type { Command, Input, Session } from './command.js';
import { packageRoot } from './package.js';

/** What a file bench/<name>.ts exports: it verifies its result first, then measures. */
export interface Bench {
  measure(options: BenchOptions): AsyncIterable<Measurement>;
}

export interface BenchOptions {
  signal: AbortSignal;
  threads: number;
  /** Repetitions, at least 3 for a number that is written down. */
  runs: number;
  /** Says on stderr what is going on. */
  note: (line: string) => void;
}

/** One line: what was measured, in which unit, and what it was compared with. */
export type Measurement = { name: string; value: number; unit: string } & Record<string, unknown>;

export const benchCommand: Command = {
  name: 'bench',
  summary: 'measure speed; lists the benches without a name',
  words: [{ name: 'NAME', help: 'a bench, or all', optional: true }],
  flags: {
    threads: { value: 'N', help: 'Threads that compute (default 2)' },
    runs: { value: 'N', help: 'Repetitions of each measurement (default 3)' },
  },
  notes: [
    'Each measurement verifies its result, then prints one JSON line. Run it on an otherwise idle machine.',
    'Computes on a GPU where there is one; LOCKSTEP_DEVICE=cpu keeps to the CPU.',
  ],
  examples: ['lockstep bench', 'lockstep bench gemm', 'lockstep bench all > measurements.jsonl'],
  run,
};

const directory = join(packageRoot, 'bench');

/** Benches by name, with the first sentence of the file's opening comment. */
export function benches(from = directory): Map<string, string> {
  const files = existsSync(from) ? readdirSync(from).filter((name) => /^[a-z][a-z0-9-]*\.ts$/.test(name)) : [];
  return new Map(
    files
      .filter((name) =>
        /^export (async )?function\*? measure\b|^export const measure\b/m.test(readFileSync(join(from, name), 'utf8')),
      )
      .sort()
      .map((name) => [name.slice(0, -3), firstSentence(readFileSync(join(from, name), 'utf8'))]),
  );
}

function firstSentence(source: string): string {
  const comment = /^\/\*\*([\s\S]*?)\*\//.exec(source)?.[1] ?? '';
  return comment
    .replace(/^\s*\*/gm, '')
    .replace(/\s+/g, ' ')
    .trim()
    .split(/(?<=\.)\s/)[0]!;
}

async function run(input: Input, { terminal, interrupts }: Session): Promise<number> {
  const known = benches();
  const [name] = input.words;
  if (known.size === 0) {
    throw new LockstepError(
      'BENCH_MISSING',
      `there are no benches in ${directory}; run this in a checkout of the repository`,
    );
  }
  if (name === undefined) {
    const width = Math.max(...[...known.keys()].map((key) => key.length));
    for (const [key, summary] of known) terminal.print(`${key.padEnd(width)}  ${summary}`);
    return 0;
  }
  if (name !== 'all' && !known.has(name)) {
    const guess = nearest(name, [...known.keys(), 'all']);
    const hint = guess ? `did you mean ${guess}?` : `there are ${[...known.keys()].join(', ')}`;
    throw new LockstepError('USAGE_BENCH', `unknown bench ${name}; ${hint}`, { name });
  }
  const { number } = await import('./values.js');
  const threads = number(input, 'threads', { minimum: 1, maximum: 256, whole: true }) ?? 2;
  const runs = number(input, 'runs', { minimum: 1, whole: true }) ?? 3;
  const context = { machine: await machine(), commit: commit(), threads };
  return interrupts.during('stopping', async (signal) => {
    const note = (line: string) => terminal.note(line);
    for (const each of name === 'all' ? known.keys() : [name]) {
      const { measure } = await loadBench(each);
      for await (const measurement of measure({ signal, threads, runs, note })) {
        terminal.print(JSON.stringify({ bench: each, ...measurement, ...context }));
      }
      signal.throwIfAborted();
    }
    return 0;
  });
}

/** The GPU where benches compute on one, else the CPU. */
async function machine(): Promise<string> {
  const { loadNative, resolveProcessor } = await import('../engine/native.js');
  if (resolveProcessor() === 'cuda') return loadNative().cuda().gpus[0]?.name ?? 'unknown GPU';
  return cpus()[0]?.model.trim() ?? 'unknown';
}

/** Benches are TypeScript beside the sources; Node loads them through jiti. */
async function loadBench(name: string): Promise<Bench> {
  const { createJiti } = await import('jiti');
  return createJiti(import.meta.url).import<Bench>(join(directory, `${name}.ts`));
}

/** Short hash of the checkout, `+` when it has changes; unknown outside a checkout. */
function commit(): string {
  try {
    const hash = git('rev-parse', '--short', 'HEAD');
    return git('status', '--porcelain') === '' ? hash : `${hash}+`;
  } catch {
    return 'unknown';
  }
}

function git(...args: string[]): string {
  return execFileSync('git', args, { cwd: packageRoot, encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim();
}
