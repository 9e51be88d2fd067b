/** What a program can import: the entry points of package.json, and that types, docstrings and docs/api.md say all of it. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, test } from 'vitest';

const root = resolve(dirname(fileURLToPath(import.meta.url)), '../..');
const { exports } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
  exports: Record<string, string | { types: string; default: string }>;
};
const entries = Object.entries(exports).flatMap(([name, files]) =>
  typeof files === 'string' ? [] : { name, ...files },
);

interface Declaration {
  kinds: Set<string>;
  isExported: boolean;
  hasDocstring: boolean;
  /** Without comments. */
  text: string;
}

interface Place {
  file: string;
  name: string;
}

/** A .d.ts file as tsc writes it: what it declares, and what it imports or passes on. */
interface Module {
  declarations: Map<string, Declaration>;
  names: Map<string, Place>;
}

const modules = new Map<string, Module>();

function moduleOf(file: string): Module {
  const known = modules.get(file);
  if (known) return known;
  const source = readFileSync(file, 'utf8');
  const found: Module = { declarations: declarationsOf(source), names: new Map() };
  modules.set(file, found);
  for (const [, list, from] of source.matchAll(/^(?:import|export)(?: type)? \{([^}]*)\} from '(\.[^']+)'/gm)) {
    for (const part of list!.split(',').filter((text) => text.trim() !== '')) {
      const [name, as = name] = part
        .trim()
        .replace(/^type /, '')
        .split(' as ');
      found.names.set(as!, { file: declared(file, from!), name: name! });
    }
  }
  for (const [, from] of source.matchAll(/^export type \* from '(\.[^']+)'/gm)) {
    const all = declared(file, from!);
    for (const [name, { isExported }] of moduleOf(all).declarations) {
      if (isExported) found.names.set(name, { file: all, name });
    }
  }
  return found;
}

const declared = (from: string, specifier: string) => join(dirname(from), specifier.replace(/\.js$/, '.d.ts'));

function declarationsOf(source: string): Map<string, Declaration> {
  const found = new Map<string, Declaration>();
  const heads =
    /^(\/\*\*(?:(?!\*\/)[\s\S])*\*\/\n)?(export )?(?:declare )?(interface|type|class|function|const) (\w+)/gm;
  const matches = [...source.matchAll(heads)];
  for (const [i, { index, 1: docstring, 2: exported, 3: kind, 4: name }] of matches.entries()) {
    const text = source
      .slice(index, matches[i + 1]?.index)
      .replace(/\/\*[\s\S]*?\*\/|^(import|export) (type )?[{*].*$/gm, '');
    const before = found.get(name!);
    found.set(name!, {
      kinds: new Set([...(before?.kinds ?? []), kind!]),
      isExported: exported !== undefined,
      hasDocstring: docstring !== undefined || before?.hasDocstring === true,
      text: `${before?.text ?? ''}${text}`,
    });
  }
  return found;
}

/** Where a name of a file is declared; undefined for names of other packages and of the language. */
function declarationOf({ file, name }: Place): Place | undefined {
  if (!existsSync(file)) return undefined;
  const { declarations, names } = moduleOf(file);
  if (declarations.has(name)) return { file, name };
  const other = names.get(name);
  return other && declarationOf(other);
}

/** What the signature of a declaration names. */
function named({ file, name }: Place): Place[] {
  const { text } = moduleOf(file).declarations.get(name)!;
  const words = new Set(text.replace(/keyof typeof \w+/g, '').match(/[A-Za-z_]\w*/g));
  const inline = [...text.matchAll(/import\("(\.[^"]+)"\)\.(\w+)/g)];
  const places = [
    ...[...words].map((word) => ({ file, name: word })),
    ...inline.map(([, from, other]) => ({ file: declared(file, from!), name: other! })),
  ];
  return places.flatMap((place) => declarationOf(place) ?? []);
}

const keyOf = ({ file, name }: Place) => `${relative(join(root, 'dist'), file)} ${name}`;

/** Of an entry point, by the name under which it is exported. */
function exportedBy(types: string): [string, Place][] {
  const file = join(root, types);
  return [...moduleOf(file).names.keys()].map((name) => [name, declarationOf({ file, name })!]);
}

describe('the entry points', () => {
  test('are src/index.ts and the index.ts of rooms', () => {
    const rooms = readdirSync(join(root, 'src')).filter((room) => existsSync(join(root, 'src', room, 'index.ts')));
    expect(entries.map(({ name }) => name).sort()).toEqual(['.', ...rooms.map((room) => `./${room}`)].sort());
    for (const { types, default: code } of entries) {
      expect(existsSync(join(root, types)), types).toBe(true);
      expect(code).toBe(types.replace('.d.ts', '.js'));
    }
  });

  test('give every type of what they export', () => {
    const given = entries.flatMap(({ types }) => exportedBy(types).map(([, place]) => place));
    const importable = new Set(given.map(keyOf));
    expect(importable.size).toBeGreaterThan(300);
    const missing = new Set<string>();
    const seen = new Set<string>();
    const walk = (place: Place, from: string): void => {
      if (seen.has(keyOf(place))) return;
      seen.add(keyOf(place));
      const { isExported, kinds } = moduleOf(place.file).declarations.get(place.name)!;
      // Values that a type is made of (`typeof`), and what a file keeps to itself, are looked through.
      const isType = isExported && ['interface', 'type', 'class'].some((kind) => kinds.has(kind));
      if (isType && !importable.has(keyOf(place))) missing.add(`${keyOf(place)}, of ${from}`);
      for (const next of named(place)) walk(next, keyOf(place));
    };
    for (const place of given) walk(place, 'an entry point');
    expect([...missing]).toEqual([]);
  });

  test.each(entries)('$name: every value has a docstring and is in docs/api.md', async ({ types, default: code }) => {
    const page = readFileSync(join(root, 'docs/api.md'), 'utf8');
    const values = Object.keys((await import(join(root, code))) as object);
    const places = new Map(exportedBy(types));
    expect(values.length).toBeGreaterThan(4);
    expect(values.filter((name) => !page.includes(`\`${name}\``))).toEqual([]);
    const undocumented = values.filter((name) => {
      const { file, name: own } = places.get(name)!;
      return !moduleOf(file).declarations.get(own)!.hasDocstring;
    });
    expect(undocumented).toEqual([]);
  });
});
