/**
 * The keywords of JSON Schema 2020-12 (json-schema.org/draft/2020-12), each compiled to a check of a value. A keyword says nothing
 * about values of other types: `minimum` holds for every text.
 */
export type Check = (value: unknown) => boolean;

type JsonObject = Readonly<Record<string, unknown>>;

/** Where a keyword stands, and what compiles the schemas in its argument. */
export interface Place {
  /** The keyword's own schema object, for keywords that depend on their neighbours. */
  readonly siblings: JsonObject;
  /** JSON pointer of the keyword's argument. */
  readonly pointer: string;
  /** Compiles a schema that stands under the argument at `steps`. */
  compile(schema: unknown, ...steps: (string | number)[]): Check;
  /** The check of a `$ref`. */
  resolve(reference: string): Check;
}

type Keyword = (argument: unknown, place: Place) => Check;

/** What a keyword's argument should have been. */
export class ArgumentError extends Error {
  constructor(readonly expected: string) {
    super(`expected ${expected}`);
  }
}

export function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function expectThat(holds: boolean, expected: string): asserts holds {
  if (!holds) throw new ArgumentError(expected);
}

function number(argument: unknown): number {
  expectThat(typeof argument === 'number', 'a number');
  return argument;
}

function count(argument: unknown): number {
  expectThat(Number.isInteger(argument) && (argument as number) >= 0, 'a whole number of at least 0');
  return argument as number;
}

function strings(argument: unknown): readonly string[] {
  expectThat(Array.isArray(argument) && argument.every((item) => typeof item === 'string'), 'a list of texts');
  return argument;
}

function expression(source: unknown): RegExp {
  expectThat(typeof source === 'string', 'a regular expression');
  try {
    return new RegExp(source, 'u');
  } catch (cause) {
    throw new ArgumentError(`a regular expression (${(cause as Error).message})`);
  }
}

function list(argument: unknown, { compile }: Place): Check[] {
  expectThat(Array.isArray(argument) && argument.length > 0, 'a list of schemas');
  return argument.map((schema, i) => compile(schema, i));
}

/** Checks by name. */
function map(argument: unknown, { compile }: Place): [string, Check][] {
  expectThat(isObject(argument), 'an object of schemas');
  return Object.entries(argument).map(([name, schema]) => [name, compile(schema, name)]);
}

const ofNumbers =
  (check: (value: number) => boolean): Check =>
  (value) =>
    typeof value !== 'number' || check(value);
const ofTexts =
  (check: (value: string) => boolean): Check =>
  (value) =>
    typeof value !== 'string' || check(value);
const ofLists =
  (check: (value: readonly unknown[]) => boolean): Check =>
  (value) =>
    !Array.isArray(value) || check(value);
const ofObjects =
  (check: (value: JsonObject) => boolean): Check =>
  (value) =>
    !isObject(value) || check(value);

const types: Readonly<Record<string, Check>> = {
  null: (value) => value === null,
  boolean: (value) => typeof value === 'boolean',
  number: (value) => typeof value === 'number',
  integer: (value) => Number.isInteger(value),
  string: (value) => typeof value === 'string',
  array: (value) => Array.isArray(value),
  object: isObject,
};

/** JSON Schema's equality: of numbers by value, of objects whatever the order of their names. */
function same(a: unknown, b: unknown): boolean {
  if (Array.isArray(a)) return Array.isArray(b) && a.length === b.length && a.every((item, i) => same(item, b[i]));
  if (!isObject(a)) return a === b;
  const names = Object.keys(a);
  if (!isObject(b) || names.length !== Object.keys(b).length) return false;
  return names.every((name) => Object.hasOwn(b, name) && same(a[name], b[name]));
}

/** Division rounds: 0.0075 / 0.0001 is 75.00000000000001. */
function divides(divisor: number, value: number): boolean {
  const quotient = value / divisor;
  return Math.abs(quotient - Math.round(quotient)) <= 1e-12 * Math.abs(quotient);
}

const codePoints = (text: string): number => Array.from(text).length;

/** `if` and `contains` read these neighbours; alone they would say nothing. */
const besideIf: Keyword = (argument, { compile, siblings }) => {
  expectThat(Object.hasOwn(siblings, 'if'), 'an if beside it');
  compile(argument);
  return () => true;
};
const besideContains: Keyword = (argument, { siblings }) => {
  expectThat(Object.hasOwn(siblings, 'contains'), 'a contains beside it');
  count(argument);
  return () => true;
};

export const keywords: Readonly<Record<string, Keyword>> = {
  $ref: (argument, { resolve }) => {
    expectThat(
      typeof argument === 'string' && /^#(\/|$)/.test(argument),
      'a reference into this schema, such as #/$defs/name',
    );
    return resolve(argument);
  },
  $defs: (argument, place) => {
    map(argument, place);
    return () => true;
  },
  definitions: (argument, place) => keywords.$defs!(argument, place),
  type: (argument) => {
    const names = typeof argument === 'string' ? [argument] : strings(argument);
    expectThat(
      names.every((name) => Object.hasOwn(types, name)),
      `of ${Object.keys(types).join(', ')}`,
    );
    return (value) => names.some((name) => types[name]!(value));
  },
  enum: (argument) => {
    expectThat(Array.isArray(argument), 'a list of values');
    return (value) => argument.some((option) => same(option, value));
  },
  const: (argument) => (value) => same(argument, value),

  allOf: (argument, place) => {
    const all = list(argument, place);
    return (value) => all.every((check) => check(value));
  },
  anyOf: (argument, place) => {
    const any = list(argument, place);
    return (value) => any.some((check) => check(value));
  },
  oneOf: (argument, place) => {
    const options = list(argument, place);
    return (value) => options.filter((check) => check(value)).length === 1;
  },
  not: (argument, { compile }) => {
    const check = compile(argument);
    return (value) => !check(value);
  },
  if: (argument, { compile, siblings }) => {
    const condition = compile(argument);
    const branch = (name: 'then' | 'else') =>
      Object.hasOwn(siblings, name) ? compile(siblings[name], '..', name) : () => true;
    const [yes, no] = [branch('then'), branch('else')];
    return (value) => (condition(value) ? yes(value) : no(value));
  },
  // biome-ignore lint/suspicious/noThenProperty: a keyword's name; nothing awaits the table
  then: besideIf,
  else: besideIf,

  properties: (argument, place) => {
    const checks = map(argument, place);
    return ofObjects((value) => checks.every(([name, check]) => !Object.hasOwn(value, name) || check(value[name])));
  },
  patternProperties: (argument, place) => {
    const checks = map(argument, place).map(([source, check]) => [expression(source), check] as const);
    return ofObjects((value) =>
      Object.keys(value).every((name) => checks.every(([pattern, check]) => !pattern.test(name) || check(value[name]))),
    );
  },
  additionalProperties: (argument, { compile, siblings }) => {
    const check = compile(argument);
    const { properties, patternProperties } = siblings;
    const named = new Set(isObject(properties) ? Object.keys(properties) : []);
    const patterns = isObject(patternProperties) ? Object.keys(patternProperties).map(expression) : [];
    const known = (name: string) => named.has(name) || patterns.some((pattern) => pattern.test(name));
    return ofObjects((value) => Object.keys(value).every((name) => known(name) || check(value[name])));
  },
  propertyNames: (argument, { compile }) => {
    const check = compile(argument);
    return ofObjects((value) => Object.keys(value).every(check));
  },
  required: (argument) => {
    const names = strings(argument);
    return ofObjects((value) => names.every((name) => Object.hasOwn(value, name)));
  },
  dependentRequired: (argument) => {
    expectThat(isObject(argument), 'an object of lists of names');
    const lists = Object.entries(argument).map(([name, needed]) => [name, strings(needed)] as const);
    return ofObjects((value) =>
      lists.every(
        ([name, needed]) => !Object.hasOwn(value, name) || needed.every((other) => Object.hasOwn(value, other)),
      ),
    );
  },
  dependentSchemas: (argument, place) => {
    const checks = map(argument, place);
    return ofObjects((value) => checks.every(([name, check]) => !Object.hasOwn(value, name) || check(value)));
  },
  minProperties: (argument) => {
    const least = count(argument);
    return ofObjects((value) => Object.keys(value).length >= least);
  },
  maxProperties: (argument) => {
    const most = count(argument);
    return ofObjects((value) => Object.keys(value).length <= most);
  },

  prefixItems: (argument, place) => {
    const checks = list(argument, place);
    return ofLists((value) => checks.every((check, i) => i >= value.length || check(value[i])));
  },
  items: (argument, { compile, siblings: { prefixItems } }) => {
    const check = compile(argument);
    const first = Array.isArray(prefixItems) ? prefixItems.length : 0;
    return ofLists((value) => value.slice(first).every((item) => check(item)));
  },
  contains: (argument, { compile, siblings: { minContains = 1, maxContains } }) => {
    const check = compile(argument);
    const [least, most] = [
      count(minContains),
      maxContains === undefined ? Number.POSITIVE_INFINITY : count(maxContains),
    ];
    return ofLists((value) => {
      const found = value.filter((item) => check(item)).length;
      return found >= least && found <= most;
    });
  },
  minContains: besideContains,
  maxContains: besideContains,
  minItems: (argument) => {
    const least = count(argument);
    return ofLists((value) => value.length >= least);
  },
  maxItems: (argument) => {
    const most = count(argument);
    return ofLists((value) => value.length <= most);
  },
  uniqueItems: (argument) => {
    expectThat(typeof argument === 'boolean', 'true or false');
    return ofLists(
      (value) => !argument || value.every((item, i) => !value.slice(0, i).some((other) => same(item, other))),
    );
  },

  minLength: (argument) => {
    const least = count(argument);
    return ofTexts((value) => codePoints(value) >= least);
  },
  maxLength: (argument) => {
    const most = count(argument);
    return ofTexts((value) => codePoints(value) <= most);
  },
  pattern: (argument) => {
    const pattern = expression(argument);
    return ofTexts((value) => pattern.test(value));
  },

  minimum: (argument) => {
    const least = number(argument);
    return ofNumbers((value) => value >= least);
  },
  maximum: (argument) => {
    const most = number(argument);
    return ofNumbers((value) => value <= most);
  },
  exclusiveMinimum: (argument) => {
    const bound = number(argument);
    return ofNumbers((value) => value > bound);
  },
  exclusiveMaximum: (argument) => {
    const bound = number(argument);
    return ofNumbers((value) => value < bound);
  },
  multipleOf: (argument) => {
    const divisor = number(argument);
    expectThat(divisor > 0, 'a number above 0');
    return ofNumbers((value) => divides(divisor, value));
  },
};
