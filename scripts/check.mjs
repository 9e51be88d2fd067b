#!/usr/bin/env node
// Everything that can be said about the code without running it: types, lint and format, C++ format, import tables.
//   --format-native   rewrites the C++ files in the house format instead
import { spawnSync } from 'node:child_process';
import { existsSync, readdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const bin = (name) => join(root, 'node_modules', '.bin', name);

function nativeFiles() {
  return ['native', 'test/native', 'bench']
    .filter((directory) => existsSync(join(root, directory)))
    .flatMap((directory) => readdirSync(join(root, directory), { withFileTypes: true, recursive: true }))
    .filter((entry) => entry.isFile() && /\.(cpp|h|cu|inc)$/.test(entry.name))
    .map((entry) => join(entry.parentPath, entry.name))
    .filter((file) => !file.includes('/fixtures/') && !file.includes('/bench/peers/'))
    .sort();
}

function run(command, args) {
  return spawnSync(command, args, {
    cwd: root,
    encoding: 'utf8',
    maxBuffer: 64 << 20,
    stdio: ['ignore', 'pipe', 'pipe'],
  });
}

if (process.argv.includes('--format-native')) {
  const result = run(bin('clang-format'), ['-i', ...nativeFiles()]);
  process.stderr.write(result.stderr);
  process.exit(result.status ?? 1);
}

const checks = [
  ['types', () => run(bin('tsc'), ['--noEmit', '-p', 'tsconfig.json'])],
  ['lint and format', () => run(bin('biome'), ['check', '--error-on-warnings', '.'])],
  ['C++ format', () => run(bin('clang-format'), ['--dry-run', '-Werror', ...nativeFiles()])],
  ['import tables', () => run(bin('vitest'), ['run', '--project', 'sanity', 'test/sanity/imports.test.ts'])],
];

let failed = 0;
for (const [name, check] of checks) {
  const started = Date.now();
  const result = check();
  const ok = result.status === 0;
  if (!ok) {
    failed += 1;
    process.stderr.write(result.stdout + result.stderr + (result.error ? `${result.error.message}\n` : ''));
  }
  process.stderr.write(`check: ${ok ? 'ok  ' : 'FAIL'} ${name} (${((Date.now() - started) / 1000).toFixed(1)} s)\n`);
}
process.exit(failed === 0 ? 0 : 1);
