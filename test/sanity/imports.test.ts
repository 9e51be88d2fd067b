/** Who may import whom: the tables below, checked against every import of src/ and every include of native/. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');

interface Room {
  may: readonly string[];
  /** Rooms of which only types may be imported. */
  typesOf?: readonly string[];
}

/** Every room may import itself and `errors`. */
const rooms: Readonly<Record<string, Room>> = {
  data: { may: [] },
  layout: { may: [] },
  engine: { may: ['layout', 'data'] },
  checkpoints: { may: ['layout', 'data', 'engine'] },
  inference: { may: ['data', 'layout', 'engine', 'checkpoints', 'cluster'] },
  losses: { may: ['data'] },
  cluster: { may: ['data', 'layout'] },
  workers: { may: ['data', 'layout', 'engine', 'checkpoints', 'cluster', 'losses'] },
  algorithms: { may: ['data', 'losses'], typesOf: ['workers'] },
  rewards: { may: ['data'] },
  train: {
    may: [
      ...['data', 'layout', 'engine', 'checkpoints', 'inference', 'losses', 'cluster'],
      ...['workers', 'algorithms', 'rewards'],
    ],
  },
  reports: { may: ['data'], typesOf: ['train'] },
  cli: { may: ['train', 'inference', 'reports', 'checkpoints', 'data', 'engine'] },
};

/** Files at the top of src: the error class, and the public face, which may name every room but the command line. */
const topFiles: Readonly<Record<string, readonly string[]>> = {
  'errors.ts': [],
  'index.ts': Object.keys(rooms).filter((name) => name !== 'cli'),
};

interface Import {
  specifier: string;
  typeOnly: boolean;
  line: number;
}

/** Static imports, re-exports and dynamic imports of a TypeScript source; comments do not count. */
function importsOf(source: string): Import[] {
  const code = source
    .replace(/\/\*[\s\S]*?\*\//g, (comment) => comment.replace(/[^\n]/g, ' '))
    .replace(/^\s*\/\/.*$/gm, '');
  const found: Import[] = [];
  const add = (pattern: RegExp, typeOnly: (match: RegExpExecArray) => boolean) => {
    for (const match of code.matchAll(pattern)) {
      const line = code.slice(0, match.index).split('\n').length;
      found.push({ specifier: match.at(-1)!, typeOnly: typeOnly(match), line });
    }
  };
  add(/^\s*(import|export)\s+(type\s+)?([\w*\s{},$]+?)\s+from\s+['"]([^'"]+)['"]/gm, (match) => {
    const names = /\{([^}]*)\}/
      .exec(match[3]!)?.[1]
      ?.split(',')
      .filter((name) => name.trim() !== '');
    const braces = match[3]!.trim().startsWith('{');
    return match[2] !== undefined || (braces && names?.every((name) => /^\s*type\s/.test(name)) === true);
  });
  add(/^\s*import\s+['"]([^'"]+)['"]/gm, () => false);
  // `import('x').T` in a type position is a type; `await import('x')` and `() => import('x')` load.
  add(/\bimport\(\s*['"]([^'"]+)['"]\s*\)/g, (match) =>
    /^\s*\.\s*[A-Z]/.test(code.slice(match.index + match[0].length)),
  );
  return found;
}

function filesUnder(directory: string, extension: RegExp): string[] {
  if (!existsSync(directory)) return [];
  return readdirSync(directory, { withFileTypes: true, recursive: true })
    .filter((entry) => entry.isFile() && extension.test(entry.name))
    .map((entry) => join(entry.parentPath, entry.name))
    .sort();
}

const source = join(root, 'src');

function roomOf(file: string): string {
  return relative(source, file).split('/')[0]!;
}

/** One line for each import that the table forbids. */
function violations(): string[] {
  return filesUnder(source, /\.ts$/).flatMap((file) => {
    const from = roomOf(file);
    const name = relative(root, file);
    const may = rooms[from]?.may ?? topFiles[from];
    if (may === undefined) return [`${name}: src/${from} is not in the table of rooms`];
    return importsOf(readFileSync(file, 'utf8')).flatMap(({ specifier, typeOnly, line }) => {
      if (!specifier.startsWith('.')) return [];
      const target = roomOf(resolve(dirname(file), specifier));
      const allowed =
        target === from ||
        target === 'errors.js' ||
        may.includes(target) ||
        (typeOnly && rooms[from]?.typesOf?.includes(target) === true);
      return allowed
        ? []
        : [`${name}:${line}: ${from} may not import ${target} (${specifier}${typeOnly ? ', types' : ''})`];
    });
  });
}

describe('imports', () => {
  test('every import of src is allowed by the table of rooms', () => {
    expect(filesUnder(source, /\.ts$/).length).toBeGreaterThan(20);
    expect(violations()).toEqual([]);
  });

  test('every relative import names a file that exists', () => {
    const broken = filesUnder(source, /\.ts$/).flatMap((file) =>
      importsOf(readFileSync(file, 'utf8'))
        .filter(({ specifier }) => specifier.startsWith('.'))
        .filter(({ specifier }) => !existsSync(resolve(dirname(file), specifier.replace(/\.js$/, '.ts'))))
        .map(({ specifier }) => `${relative(root, file)}: ${specifier}`),
    );
    expect(broken).toEqual([]);
  });

  test('the parser sees every form of import', () => {
    const code = `
      import { a, type B } from './one.js';
      import type { C } from './two.js';
      import { type D, type E } from './three.js';
      import * as all from './four.js';
      import './five.js';
      export { f } from './six.js';
      export type { G } from './seven.js';
      export * from './eight.js';
      // import { no } from './comment.js';
      /* import { no } from './comment.js'; */
      import {
        h,
      } from './nine.js';
      const lazy = await import('./ten.js');
      type T = import('./eleven.js').Thing;`;
    const seen = Object.fromEntries(importsOf(code).map(({ specifier, typeOnly }) => [specifier, typeOnly]));
    expect(seen).toEqual({
      './one.js': false,
      './two.js': true,
      './three.js': true,
      './four.js': false,
      './five.js': false,
      './six.js': false,
      './seven.js': true,
      './eight.js': false,
      './nine.js': false,
      './ten.js': false,
      './eleven.js': true,
    });
  });

  test('only the engine touches the addon', () => {
    const touching = filesUnder(source, /\.ts$/).filter((file) => /\.node['"`]/.test(readFileSync(file, 'utf8')));
    expect(touching.map((file) => relative(source, file).split('/')[0])).toEqual(touching.map(() => 'engine'));
  });
});

/** A layer of native/ may include itself and these folders or files. */
const layers: Readonly<Record<string, readonly string[]>> = {
  core: [],
  cuda: ['core/', 'comm/nccl/nccl_api.h'],
  kernels: ['core/', 'cuda/'],
  comm: ['core/', 'cuda/'],
  transfer: ['comm/communicator.h', 'core/'],
  model: ['kernels/', 'comm/background.h', 'comm/communicator.h', 'core/'],
  binding: ['model/', 'kernels/', 'transfer/', 'comm/', 'cuda/backend.h', 'core/'],
};

const native = join(root, 'native');

function includesOf(file: string): { path: string; line: number }[] {
  return readFileSync(file, 'utf8')
    .split('\n')
    .flatMap((text, index) => {
      const match = /^\s*#\s*include\s+["<]([^">]+)[">]/.exec(text);
      return match ? [{ path: match[1]!, line: index + 1 }] : [];
    });
}

describe('includes', () => {
  const files = filesUnder(native, /\.(h|cpp|cu|inc)$/);

  test('every include of native is allowed by the table of layers', () => {
    expect(files.length).toBeGreaterThan(5);
    const wrong = files.flatMap((file) => {
      const layer = relative(native, file).split('/')[0]!;
      const may = layers[layer];
      if (may === undefined) return [`native/${layer} is not in the table of layers`];
      return includesOf(file).flatMap(({ path, line }) => {
        const sibling = join(dirname(file), path);
        const target = existsSync(join(native, path))
          ? path
          : existsSync(sibling)
            ? relative(native, sibling)
            : undefined;
        if (target === undefined) return [];
        const allowed = target.startsWith(`${layer}/`) || may.some((prefix) => target.startsWith(prefix));
        return allowed ? [] : [`${relative(root, file)}:${line}: ${layer} may not include ${target}`];
      });
    });
    expect(wrong).toEqual([]);
  });

  test('only binding includes napi.h', () => {
    const including = files.filter((file) =>
      includesOf(file).some(({ path }) => /^(napi|node_api|js_native_api)\.h$/.test(path)),
    );
    expect(including.map((file) => relative(native, file).split('/')[0])).toEqual(including.map(() => 'binding'));
  });
});
