/** Runs the command line as a user does: the built entry in a process of its own. */
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { mkdtemp, readFile, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';

const entry = resolve('dist/cli/main.js');
export const fixtures = resolve(process.env.LOCKSTEP_FIXTURES ?? 'test/fixtures');
export const smallModel = join(fixtures, 'models', 'llama');

export interface Ended {
  code: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

export interface StartOptions {
  /** Variables beside those of this process. */
  environment?: Record<string, string>;
  cwd?: string;
  /** Most bytes of a file that the process may write (ulimit -f, in KiB). */
  fileKibibytes?: number;
}

export function start(args: readonly string[], { environment, cwd, fileKibibytes }: StartOptions = {}) {
  if (!existsSync(entry)) throw new Error(`${entry} is missing: run npm run build first`);
  const options = { env: { ...process.env, NO_COLOR: '1', ...environment }, ...(cwd ? { cwd } : {}) };
  const child =
    fileKibibytes === undefined
      ? spawn(process.execPath, [entry, ...args], options)
      : spawn('bash', ['-c', `ulimit -f ${fileKibibytes}; exec "$0" "$@"`, process.execPath, entry, ...args], options);
  let stdout = '';
  let stderr = '';
  child.stdout.on('data', (chunk) => {
    stdout += chunk;
  });
  child.stderr.on('data', (chunk) => {
    stderr += chunk;
  });
  const ended = new Promise<Ended>((done) => {
    child.on('close', (code, signal) => done({ code, signal, stdout, stderr }));
  });
  return { child, ended, output: () => stdout };
}

export const lockstep = (args: readonly string[], options?: StartOptions): Promise<Ended> => start(args, options).ended;

export async function temporary(): Promise<string> {
  return mkdtemp(join(tmpdir(), 'lockstep-e2e-'));
}

/** Writes a configuration and returns its path. */
export async function configFile(folder: string, config: unknown, name = 'config.json'): Promise<string> {
  const path = join(folder, name);
  await writeFile(path, JSON.stringify(config));
  return path;
}

export async function writeRows(path: string, rows: readonly unknown[]): Promise<string> {
  await writeFile(path, rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
  return path;
}

/** Numbers in [0, 1) that are the same every time. */
export function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

/** Sequences of token ids of a small vocabulary. */
export function tokenRows(count: number, vocabulary: number, seed = 1): { tokens: number[] }[] {
  const random = randomNumbers(seed);
  return Array.from({ length: count }, () => {
    const first = 3 + Math.floor(random() * (vocabulary - 40));
    return { tokens: Array.from({ length: 8 + Math.floor(random() * 24) }, (_, i) => first + ((i * 3) % 32)) };
  });
}

export async function metricsOf(output: string): Promise<Record<string, number>[]> {
  const text = await readFile(join(output, 'metrics.jsonl'), 'utf8');
  return text
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line) as Record<string, number>);
}
