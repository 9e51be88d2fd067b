/** What a stranger gets: the package's contents, a quiet import, and no trace of the machine it was made on. */
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, readFileSync, statSync } from 'node:fs';
import { homedir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');

/** Files under version control, or about to be. */
function repositoryFiles(): string[] {
  const list = execFileSync('git', ['ls-files', '--cached', '--others', '--exclude-standard', '-z'], {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 64 << 20,
  });
  return list.split('\0').filter((name) => name !== '' && existsSync(join(root, name)));
}

describe('the package', () => {
  test('holds what runs and what builds the addon, and no tests or data', () => {
    const result = spawnSync('npm', ['pack', '--dry-run', '--json', '--ignore-scripts'], {
      cwd: root,
      encoding: 'utf8',
    });
    const [pack] = JSON.parse(result.stdout) as [{ files: { path: string }[] }];
    const files = pack.files.map(({ path }) => path);
    for (const needed of [
      'package.json',
      'LICENSE',
      'README.md',
      'dist/cli/main.js',
      'dist/index.js',
      'dist/index.d.ts',
    ]) {
      expect(files).toContain(needed);
    }
    expect(files).toContain('native/CMakeLists.txt');
    expect(files).toContain('scripts/build-native.mjs');
    expect(files).toContain('scripts/cuda.mjs');
    expect(files.filter((path) => /^(test|bench|build|examples|runs|src)\//.test(path))).toEqual([]);
    expect(files.filter((path) => /fixture|\.safetensors$|\.jsonl$|\.test\./.test(path))).toEqual([]);
  });

  test('runs no script when it is installed', () => {
    const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as Record<string, never>;
    const scripts = Object.keys(manifest.scripts ?? {});
    const lifecycle = ['preinstall', 'install', 'postinstall', 'prepare', 'preprepare', 'postprepare', 'prepublish'];
    expect(scripts.filter((name) => lifecycle.includes(name))).toEqual([]);
    expect(manifest.gypfile).toBe(false);
  });

  test('the command is executable', () => {
    expect(statSync(join(root, 'dist', 'cli', 'main.js')).mode & 0o111).toBe(0o111);
  });

  test('importing the library prints nothing, starts no thread, installs no signal handler and holds no process open', () => {
    const script = `
      import { readdirSync } from 'node:fs';
      import { stat } from 'node:fs/promises';
      const threads = () => readdirSync('/proc/self/task').length;
      const names = ['SIGINT', 'SIGTERM', 'SIGHUP', 'uncaughtException', 'unhandledRejection', 'exit', 'beforeExit', 'warning'];
      const handlers = () => names.map((name) => process.listenerCount(name)).join();
      // Loading any module reads files, and that starts the threads of Node's own pool: they are there before the count.
      await stat('/');
      const before = { threads: threads(), handlers: handlers() };
      const library = await import(${JSON.stringify(join(root, 'dist', 'index.js'))});
      const after = { threads: threads(), handlers: handlers() };
      process.stdout.write(JSON.stringify({ before, after, names: Object.keys(library).length }));
      process.on('exit', () => {});`;
    const result = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
      encoding: 'utf8',
      timeout: 30_000,
    });
    expect(result.stderr).toBe('');
    expect(result.status).toBe(0);
    const { before, after, names } = JSON.parse(result.stdout) as Record<string, unknown>;
    expect(after).toEqual(before);
    expect(names).toBeGreaterThan(3);
  });
});

describe('the repository', () => {
  test('the lockfile holds no addresses', () => {
    expect(readFileSync(join(root, 'package-lock.json'), 'utf8')).not.toMatch(
      /"resolved"|https?:\/\/(?!opencollective|github|www\.patreon|feross|paypal|tidelift|ko-fi)[^"]*\.tgz/,
    );
  });

  test('no file names a folder of the machine it was written on', () => {
    const text = /\.(ts|mjs|js|json|md|yaml|yml|h|cpp|cu|txt|gyp|toml)$|^\.ci\/run$/;
    const own = [root, homedir()].filter((path) => path.length > 5);
    const naming = repositoryFiles()
      .filter((name) => text.test(name) && !name.startsWith('test/fixtures/'))
      .filter((name) => {
        const content = readFileSync(join(root, name), 'utf8');
        return own.some((path) => content.includes(path));
      });
    expect(naming).toEqual([]);
  });

  test('source files keep to the sizes of the house, with a fifth of slack', () => {
    const limits: readonly (readonly [RegExp, number])[] = [
      [/^src\/.*\.ts$/, 480],
      [/^native\/.*\.(cpp|h|cu)$/, 720],
    ];
    const long = repositoryFiles().flatMap((name) => {
      const limit = limits.find(([pattern]) => pattern.test(name))?.[1];
      if (limit === undefined) return [];
      const lines = readFileSync(join(root, name), 'utf8').split('\n').length;
      return lines > limit ? [`${name}: ${lines} lines`] : [];
    });
    expect(long).toEqual([]);
  });

  test('an algorithm and a worker are read on one page: 120 lines', () => {
    const workers = ['actor', 'critic', 'reference', 'reward', 'cost'].map((name) => `src/workers/${name}.ts`);
    // What algorithms share: their roles, metrics and the handling of rollouts.
    const shared = ['algorithm', 'metrics', 'rollout'].map((name) => `src/algorithms/${name}.ts`);
    const own = repositoryFiles().filter((name) => name.startsWith('src/algorithms/') && !shared.includes(name));
    expect(own.length).toBeGreaterThanOrEqual(10);
    const long = [...workers, ...own].flatMap((name) => {
      const lines = readFileSync(join(root, name), 'utf8').trimEnd().split('\n').length;
      return lines > 120 ? [`${name}: ${lines} lines`] : [];
    });
    expect(long).toEqual([]);
  });
});
