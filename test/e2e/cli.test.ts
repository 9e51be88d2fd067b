/** The command line as a user meets it: words, exit codes, streams. Commands that run a model have tests of their own. */
import { spawn, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { describe, expect, test } from 'vitest';
import { syntheticRun } from '../unit/report-run.js';

const root = resolve(import.meta.dirname, '../..');
const entry = join(root, 'dist', 'cli', 'main.js');

function lockstep(...args: string[]) {
  return spawnSync(process.execPath, [entry, ...args], { encoding: 'utf8', timeout: 60_000 });
}

const commands = ['train', 'generate', 'score', 'report', 'bench', 'doctor'];

describe('lockstep', () => {
  test.each([['--help'], ['-h'], ['help']])('%s lists every command on stdout', (flag) => {
    const { status, stdout, stderr } = lockstep(flag);
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    for (const command of commands) expect(stdout).toContain(`\n  ${command} `);
  });

  test.each(commands)('%s --help shows flags and examples', (command) => {
    const { status, stdout, stderr } = lockstep(command, '--help');
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    expect(stdout).toContain(`Usage: lockstep ${command}`);
    expect(stdout).toContain(`Examples:\n  `);
  });

  test.each(['generate', 'train'])('help of %s loads nothing but the command line', (command) => {
    const coverage = mkdtempSync(join(tmpdir(), 'lockstep-help-'));
    spawnSync(process.execPath, [entry, command, '--help'], { env: { ...process.env, NODE_V8_COVERAGE: coverage } });
    const loaded = readdirSync(coverage).flatMap((name) => {
      const { result } = JSON.parse(readFileSync(join(coverage, name), 'utf8')) as { result: { url: string }[] };
      return result.map(({ url }) => url).filter((url) => url.startsWith('file:'));
    });
    expect(loaded.length).toBeGreaterThan(3);
    expect(loaded.filter((url) => !/\/dist\/(cli\/[a-z0-9-]+|reports\/numbers|errors)\.js$/.test(url))).toEqual([]);
  });

  test('help takes at most twice as long again as an empty program: under 200 ms on an idle machine', () => {
    const fastest = (args: string[]) => {
      const times = Array.from({ length: 7 }, () => {
        const start = performance.now();
        expect(spawnSync(process.execPath, args).status).toBe(0);
        return performance.now() - start;
      });
      return Math.min(...times);
    };
    const empty = fastest(['-e', '0']);
    for (const command of ['generate', 'train']) expect(fastest([entry, command, '--help'])).toBeLessThan(3 * empty);
  });

  test('--version is that of the package', () => {
    const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string };
    expect(lockstep('--version').stdout).toBe(`${version}\n`);
  });

  test.each([
    [[], 'Usage: lockstep COMMAND'],
    [['frobnicate'], 'unknown command frobnicate; commands: train'],
    [['trian', 'x.yaml'], 'did you mean train?'],
    [['score', 'model', '--inptu', 'x'], 'did you mean --input?'],
    [['score'], 'MODEL is missing'],
    [['score', 'model'], 'give --input FILE.jsonl'],
    [['generate', 'model'], 'give --prompt TEXT or --input FILE.jsonl'],
    [['generate', 'model', '--prompt', 'a', '--input', 'b'], 'exclude each other'],
    [
      ['generate', 'model', '--prompt', 'a', '--temperature', '-1'],
      '--temperature: expected a number >= 0, received -1',
    ],
    [['generate', 'model', '--prompt', 'a', '--top-p', '0'], '--top-p'],
    [['generate', 'model', '--prompt', 'a', '--dtype', 'float16'], 'expected float32 or bfloat16, received float16'],
    [['generate', 'model', '--prompt', 'a', '--tensor', '1.5'], '--tensor: expected'],
    [['score', 'model', '--input', 'x', '--pipeline', '0'], '--pipeline: expected'],
    [['train', 'a.yaml', 'b.yaml'], 'unexpected argument b.yaml'],
    [['report', 'x', '--html'], '--html needs a value'],
  ])('%j is a wrong command line: exit code 2, stderr only', (args, words) => {
    const { status, stdout, stderr } = lockstep(...args);
    expect(status).toBe(2);
    expect(stdout).toBe('');
    expect(stderr).toContain(words);
    expect(stderr).not.toContain('    at ');
  });

  test('a failure exits with 1, and shows its stack only with --verbose', () => {
    const plain = lockstep('report', '/nowhere/at/all');
    expect(plain.status).toBe(1);
    expect(plain.stderr).toBe(
      "error RUN_NOT_FOUND: there is no folder /nowhere/at/all; give the folder that the configuration's output names\n",
    );
    expect(lockstep('report', '/nowhere/at/all', '--verbose').stderr).toContain('    at ');
  });
});

describe('lockstep report', () => {
  test('prints the summary and writes the page into the run', () => {
    const folder = syntheticRun('ppo');
    const { status, stdout, stderr } = lockstep('report', folder);
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' });
    expect(stdout).toContain('reward.mean');
    expect(stdout).toContain(join(folder, 'report.html'));
    expect(readFileSync(join(folder, 'report.html'), 'utf8')).toContain('<!doctype html>');
  });

  test('gives its numbers as JSON and writes where it is told', () => {
    const folder = syntheticRun('reward', { done: 40 });
    const html = join(folder, 'elsewhere.html');
    const { status, stdout } = lockstep('report', folder, '--json', '--html', html);
    expect(status).toBe(0);
    expect(JSON.parse(stdout)).toMatchObject({ algorithm: 'reward', step: 40, steps: 100, complete: false, html });
    expect(existsSync(html)).toBe(true);
    expect(existsSync(join(folder, 'report.html'))).toBe(false);
  });

  test('survives a reader that goes away', async () => {
    const folder = syntheticRun('ppo');
    const child = spawn(process.execPath, [entry, 'report', folder, '--json'], { stdio: ['ignore', 'pipe', 'pipe'] });
    child.stdout.destroy();
    let stderr = '';
    child.stderr.on('data', (chunk: Buffer) => {
      stderr += String(chunk);
    });
    const code = await new Promise((done) => child.on('close', done));
    expect({ code, stderr }).toEqual({ code: 0, stderr: '' });
  });
});

describe('lockstep doctor', () => {
  test('finds the addon and the instruction set that runs', () => {
    const { status, stdout } = lockstep('doctor', '--json');
    const found = JSON.parse(stdout) as Record<string, never>;
    expect(found).toMatchObject({ node: process.versions.node, gpu: { gpus: expect.any(Array) }, problems: [] });
    expect(status).toBe(0);
    expect(['avx2', 'avx512', 'avx512-bf16']).toContain((found.instructionSet as { chosen: string }).chosen);
    expect(lockstep('doctor').stdout).toContain('\nready\n');
  });

  test('names the addon that cannot be loaded, every path tried and the build command', () => {
    const broken = join(mkdtempSync(join(tmpdir(), 'lockstep-doctor-')), 'lockstep.node');
    writeFileSync(broken, 'not an addon');
    const isolated = spawnSync(process.execPath, [entry, 'doctor', '--json'], {
      encoding: 'utf8',
      env: { ...process.env, LOCKSTEP_NATIVE_PATH: broken },
    });
    const found = JSON.parse(isolated.stdout) as { problems: string[]; native: { tried: string[]; path: null } };
    expect(isolated.status).toBe(1);
    expect(found.native.path).toBeNull();
    expect(found.native.tried[0]).toBe(broken);
    expect(found.problems.join()).toContain('build-native.mjs');
  });

  test('refuses an instruction set that there is not', () => {
    const forced = spawnSync(process.execPath, [entry, 'doctor'], {
      encoding: 'utf8',
      env: { ...process.env, LOCKSTEP_ISA: 'sse2' },
    });
    expect(forced.status).toBe(1);
    expect(forced.stdout).toContain("LOCKSTEP_ISA is 'sse2'");
  });
});

describe('an interrupt', () => {
  /** A process that works until its signal aborts, ends in order after 300 ms, and exits as a command would. */
  const script = `
    const { Interrupts } = await import(${JSON.stringify(join(root, 'dist', 'cli', 'interrupts.js'))});
    const { Terminal } = await import(${JSON.stringify(join(root, 'dist', 'cli', 'terminal.js'))});
    const interrupts = new Interrupts(new Terminal());
    const cancelling = process.argv[1];
    await interrupts.during('finishing', async (signal, cancel) => {
      const busy = setInterval(() => {}, 1000);
      process.stdout.write('working\\n');
      await new Promise((done) => signal.addEventListener('abort', done));
      const cancelled = await new Promise((done) => {
        const saving = setTimeout(() => done(false), 300);
        cancel.addEventListener('abort', () => {
          clearTimeout(saving);
          setTimeout(() => done(true), 300);
        });
      });
      process.stdout.write(cancelled ? 'cancelled\\n' : 'saved\\n');
      clearInterval(busy);
    }, cancelling);
    process.exit(interrupts.exitCode ?? 0);`;

  const interrupted = (...signals: NodeJS.Signals[]) => interruptedWith([], ...signals);

  async function interruptedWith(args: string[], ...signals: NodeJS.Signals[]) {
    const child = spawn(process.execPath, ['--input-type=module', '-e', script, ...args]);
    let [stdout, stderr] = ['', ''];
    child.stderr.on('data', (chunk: Buffer) => {
      stderr += String(chunk);
      const next = signals.shift();
      if (next) child.kill(next);
    });
    child.stdout.on('data', (chunk: Buffer) => {
      if (stdout === '') child.kill(signals.shift());
      stdout += String(chunk);
    });
    const code = await new Promise((done) => child.on('close', done));
    return { code, stdout, stderr };
  }

  test.each([
    ['SIGINT', 130],
    ['SIGTERM', 143],
  ] as const)('%s lets the work end in order and exits with %d', async (signal, code) => {
    const stderr = `${signal}: finishing; again ends at once\n`;
    expect(await interrupted(signal)).toEqual({ code, stdout: 'working\nsaved\n', stderr });
  });

  test('a second one ends at once', async () => {
    expect(await interrupted('SIGINT', 'SIGINT')).toMatchObject({ code: 130, stdout: 'working\n' });
    expect(await interrupted('SIGINT', 'SIGTERM')).toMatchObject({ code: 143, stdout: 'working\n' });
  });

  test('of work that can be cancelled a second one cancels it, and a third ends at once', async () => {
    const stderr = 'SIGINT: finishing; again ends at once\nSIGTERM: cancelling; again ends the process\n';
    const cancelled = await interruptedWith(['cancelling'], 'SIGINT', 'SIGTERM');
    expect(cancelled).toEqual({ code: 143, stdout: 'working\ncancelled\n', stderr });
    const ended = await interruptedWith(['cancelling'], 'SIGINT', 'SIGTERM', 'SIGINT');
    expect(ended).toEqual({ code: 130, stdout: 'working\n', stderr });
  });
});
