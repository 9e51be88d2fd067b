/** Turns the schema's issues into messages that name the key, what was expected, what came, and the nearest known key. */
import { z } from 'zod';
import { LockstepError, nearest } from '../errors.js';
import { at, explainUnions, type Issue } from './config-unions.js';
import { algorithms, configSchema } from './schema.js';

type Problem = { code: 'CONFIG_UNKNOWN_KEY' | 'CONFIG_INVALID'; message: string; path: string };

/** One error for all issues: unknown keys first, since they often explain the rest. */
export function explainIssues(issues: readonly Issue[], input: unknown): LockstepError {
  const known = knownKeys(input);
  const problems = explainUnions(issues, input).flatMap((issue): Problem[] =>
    issue.code === 'unrecognized_keys'
      ? issue.keys.map((key) => unknownKey(key, issue.path, known))
      : [invalidValue(issue, input)],
  );
  problems.sort((a, b) => Number(b.code === 'CONFIG_UNKNOWN_KEY') - Number(a.code === 'CONFIG_UNKNOWN_KEY'));
  const [first] = problems as [Problem];
  return new LockstepError(first.code, problems.map((problem) => problem.message).join('\n'), {
    path: first.path,
    problems: problems.map(({ code, path }) => ({ code, path })),
  });
}

function unknownKey(key: string, path: readonly PropertyKey[], known: Known): Problem {
  const shown = [...path.map(String), key].join('.');
  const parent = generic(path).join('.');
  const full = [...generic(path), key].join('.');
  const siblings = known.names.filter((name) => name.slice(0, Math.max(0, name.lastIndexOf('.'))) === parent);
  const guess =
    nearest(lastSegment(full), siblings, lastSegment) ?? nearest(lastSegment(key), known.names, lastSegment);
  const belongs = elsewhere(full);
  const hint = siblings.includes(full)
    ? `it goes with ${known.needing(generic(path), key).join(', ')}`
    : belongs
      ? `it belongs to algorithm: ${belongs}`
      : guess
        ? `did you mean ${siblings.includes(guess) ? [...path.map(String), lastSegment(guess)].join('.') : guess}?`
        : `known keys here: ${siblings.map(lastSegment).join(', ')}`;
  return { code: 'CONFIG_UNKNOWN_KEY', message: `${shown}: unknown key; ${hint}`, path: shown };
}

function invalidValue(issue: Issue, input: unknown): Problem {
  const path = issue.path.map(String).join('.');
  const received = describe(at(input, issue.path));
  const name = path === '' ? 'configuration' : path;
  return {
    code: 'CONFIG_INVALID',
    message: `${name}: expected ${expectation(issue)}, received ${received}`,
    path,
  };
}

function expectation(issue: Issue): string {
  switch (issue.code) {
    case 'invalid_type':
      return issue.expected === 'int' ? 'a whole number' : article(issue.expected);
    case 'invalid_value':
      return issue.values.length === 1 ? String(issue.values[0]) : `one of ${issue.values.join(', ')}`;
    case 'too_small':
      if (issue.origin === 'array') return `a list of ${issue.minimum}`;
      if (issue.origin === 'string') return 'a text that is not empty';
      return `a number ${issue.inclusive ? '>=' : '>'} ${issue.minimum}`;
    case 'too_big':
      if (issue.origin === 'array') return `a list of ${issue.maximum}`;
      return `a number ${issue.inclusive ? '<=' : '<'} ${issue.maximum}`;
    case 'invalid_union':
      if (issue.path.length === 1 && issue.path[0] === 'algorithm') return `one of ${algorithms.join(', ')}`;
      return [...new Set(issue.errors.map((options) => (options[0] ? expectation(options[0]) : 'another value')))].join(
        ' or ',
      );
    case 'invalid_format':
      return issue.message.replace(/^expected /, '');
    default:
      return issue.message;
  }
}

function article(type: string): string {
  return type === 'array' ? 'a list' : type === 'object' ? 'an object' : `a ${type}`;
}

function describe(value: unknown): string {
  if (value === undefined) return 'nothing';
  if (typeof value === 'number') return String(value);
  const text = JSON.stringify(value) ?? String(value);
  return text.length > 60 ? `${text.slice(0, 57)}...` : text;
}

interface SchemaNode {
  properties?: Record<string, SchemaNode & { const?: unknown }>;
  required?: string[];
  items?: SchemaNode;
  oneOf?: SchemaNode[];
  anyOf?: SchemaNode[];
}

function branches(): SchemaNode[] {
  return (z.toJSONSchema(configSchema, { io: 'input' }) as SchemaNode).oneOf!;
}

/** The place of every item of a list, in names of keys. */
const item = '0';
const generic = (path: readonly PropertyKey[]): string[] =>
  path.map((segment) => (typeof segment === 'number' ? item : String(segment)));

/** A node, or the alternatives that it is a choice of. */
const alternatives = (node: SchemaNode): SchemaNode[] => (node.anyOf ? node.anyOf.flatMap(alternatives) : [node]);

function paths(whole: SchemaNode, prefix = ''): string[] {
  const found = alternatives(whole).flatMap((node) => [
    ...Object.entries(node.properties ?? {}).flatMap(([key, child]) => [
      prefix + key,
      ...paths(child, `${prefix}${key}.`),
    ]),
    ...(node.items ? paths(node.items, `${prefix}${item}.`) : []),
  ]);
  return [...new Set(found)];
}

interface Known {
  /** Full names of all keys. */
  names: readonly string[];
  /** The keys that alternatives with this key at the path need. */
  needing(path: readonly string[], key: string): string[];
}

/** The keys of the configuration's algorithm. */
function knownKeys(input: unknown): Known {
  const algorithm = at(input, ['algorithm']);
  const branch = branches().find((node) => node.properties?.algorithm?.const === algorithm);
  return {
    names: branch ? paths(branch) : [],
    needing: (path, key) => {
      const step = (nodes: SchemaNode[], segment: string): SchemaNode[] =>
        nodes.flatMap(({ properties, items }) => {
          const child = properties?.[segment] ?? (segment === item ? items : undefined);
          return child ? alternatives(child) : [];
        });
      const nodes = path.reduce(step, branch ? [branch] : []);
      return [...new Set(nodes.filter((node) => node.properties?.[key]).flatMap(({ required }) => required ?? []))];
    },
  };
}

/** The algorithms that know a key which this one does not. */
function elsewhere(full: string): string | undefined {
  const owners = branches().filter((node) => paths(node).includes(full));
  return owners.length > 0 ? owners.map((node) => String(node.properties!.algorithm!.const)).join(', ') : undefined;
}

function lastSegment(name: string): string {
  return name.slice(name.lastIndexOf('.') + 1);
}
