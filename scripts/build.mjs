#!/usr/bin/env node
// Builds everything: TypeScript (src -> dist) and the addon. What is up to date is skipped.
// Flags are those of build-native.mjs (--tests also builds the kernel contract suite).
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const source = join(root, 'src');
const dist = join(root, 'dist');
const record = join(root, 'build', 'typescript.fingerprint');

function say(text) {
  process.stderr.write(`types:  ${text}\n`);
}

function filesUnder(directory) {
  return readdirSync(directory, { withFileTypes: true, recursive: true })
    .filter((entry) => entry.isFile())
    .map((entry) => join(entry.parentPath, entry.name))
    .sort();
}

/** Changes when a source file, or a setting of the compiler, does. */
function fingerprint() {
  const hash = createHash('sha256');
  const settings = ['tsconfig.json', 'tsconfig.build.json', 'package.json', 'package-lock.json'].map((name) =>
    join(root, name),
  );
  for (const file of [...settings, ...filesUnder(source)])
    hash.update(`${relative(root, file)}\n`).update(readFileSync(file));
  return hash.digest('hex');
}

/** Removes what an earlier build wrote for a source file that is gone. */
function prune() {
  for (const file of filesUnder(dist)) {
    const stem = relative(dist, file).replace(/(\.d\.ts|\.js)(\.map)?$/, '');
    if (!existsSync(join(source, `${stem}.ts`))) rmSync(file);
  }
}

function buildTypes() {
  const started = Date.now();
  const current = fingerprint();
  const entry = join(dist, 'cli', 'main.js');
  if (existsSync(entry) && existsSync(record) && readFileSync(record, 'utf8') === current) {
    say('up to date');
    return true;
  }
  const compiler = join(root, 'node_modules', '.bin', 'tsc');
  if (!existsSync(compiler)) {
    say('the TypeScript compiler is not installed; run npm ci first');
    return false;
  }
  say('compiling src to dist');
  const result = spawnSync(compiler, ['-p', join(root, 'tsconfig.build.json')], { stdio: ['ignore', 2, 2] });
  if (result.status !== 0) return false;
  prune();
  // npm links the command to this file; a rebuild must leave it executable.
  chmodSync(entry, statSync(entry).mode | 0o111);
  mkdirSync(dirname(record), { recursive: true });
  writeFileSync(record, current);
  say(`ready in ${((Date.now() - started) / 1000).toFixed(1)} s: dist/`);
  return true;
}

if (!buildTypes()) process.exit(1);
const native = spawnSync(process.execPath, [join(root, 'scripts', 'build-native.mjs'), ...process.argv.slice(2)], {
  stdio: 'inherit',
});
process.exit(native.status ?? 1);
