/**
 * JSON schema: 1 for a response that is JSON which a schema allows, else 0. Schemas are JSON Schema 2020-12 with references into
 * themselves; a keyword that would check nothing here (`format`, `unevaluatedProperties`, a typing error) is refused when the
 * schema is compiled, and so is a wrong argument: a schema that says less than it seems to would be easy to satisfy.
 */
import { LockstepError } from '../../errors.js';
import type { RewardFunction } from '../reward-function.js';
import { each } from './samples.js';
import { ArgumentError, type Check, isObject, keywords } from './schema-keywords.js';

export interface JsonSchemaSettings {
  /** An object, or true or false. */
  readonly schema: unknown;
  /** What of the response is read: all of it, or the last block between ``` fences (without one the reward is 0). */
  readonly extract: 'whole' | 'fenced';
}

/** Throws `REWARD_SETTINGS`. */
export function jsonSchema({ schema, extract }: JsonSchemaSettings): RewardFunction {
  const allows = compileSchema(schema);
  return each(({ response }) => {
    const text = extract === 'whole' ? response : fencedBlock(response);
    return Number(text !== undefined && allowsText(allows, text));
  });
}

function fencedBlock(text: string): string | undefined {
  const [, ...behindFences] = text.split('```');
  // Of n fences every second closes; a last one that is open ends nothing.
  const last = behindFences[2 * Math.floor(behindFences.length / 2) - 2];
  return last?.replace(/^[\w-]*\s/, '');
}

function allowsText(allows: Check, text: string): boolean {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return false;
  }
  try {
    return allows(value);
  } catch (error) {
    // Nested deeper than the stack: no schema that ends allows it.
    if (error instanceof RangeError) return false;
    throw error;
  }
}

/** Keywords that describe. */
const annotations = new Set(
  '$schema $comment title description default examples deprecated readOnly writeOnly'.split(' '),
);

/** An `$id` names the whole schema; one inside would change what references mean. */
const isAnnotation = (name: string, pointer: string): boolean =>
  annotations.has(name) || (name === '$id' && pointer === '#');

/** A schema as a check of values. Throws `REWARD_SETTINGS`, with the place in the schema. */
export function compileSchema(root: unknown): Check {
  const references = new Map<string, Check>();

  const compile = (schema: unknown, pointer: string): Check => {
    if (typeof schema === 'boolean') return () => schema;
    if (!isObject(schema)) throw wrong(pointer, `expected a schema, received ${JSON.stringify(schema)}`);
    const checks = Object.entries(schema)
      .filter(([name]) => !isAnnotation(name, pointer))
      .map(([name, argument]) => compileKeyword(schema, name, argument, `${pointer}/${toStep(name)}`));
    return (value) => checks.every((check) => check(value));
  };

  const compileKeyword = (
    siblings: Readonly<Record<string, unknown>>,
    name: string,
    argument: unknown,
    pointer: string,
  ) => {
    const keyword = Object.hasOwn(keywords, name) ? keywords[name] : undefined;
    if (!keyword) throw wrong(pointer, 'this keyword would check nothing; remove it, or say it with others');
    try {
      return keyword(argument, {
        siblings,
        pointer,
        compile: (inner, ...steps) => compile(inner, [pointer, ...steps.map((step) => toStep(String(step)))].join('/')),
        resolve: (reference) => resolve(reference, pointer),
      });
    } catch (error) {
      if (!(error instanceof ArgumentError)) throw error;
      throw wrong(pointer, `expected ${error.expected}, received ${JSON.stringify(argument)}`);
    }
  };

  const resolve = (reference: string, from: string): Check => {
    const known = references.get(reference);
    if (known) return known;
    let compiled: Check | undefined;
    const check: Check = (value) => compiled!(value);
    references.set(reference, check);
    compiled = compile(lookUp(root, reference, from), reference);
    return check;
  };

  const whole = compile(root, '#');
  for (const [reference, check] of [...references, ['#', whole] as const]) checkEnds(check, reference);
  return whole;
}

function lookUp(root: unknown, reference: string, from: string): unknown {
  const steps = reference.split('/').slice(1);
  return steps
    .map((step) => fromStep(step, from))
    .reduce<unknown>((node, step) => {
      if (typeof node === 'object' && node !== null && Object.hasOwn(node, step))
        return (node as Record<string, unknown>)[step];
      throw wrong(from, `there is nothing at ${reference}`);
    }, root);
}

/** A schema that refers to itself for the same value never ends. */
function checkEnds(check: Check, reference: string): void {
  try {
    for (const value of [null, true, 0, '', [], {}]) check(value);
  } catch {
    throw wrong(reference, 'it refers to itself without end');
  }
}

// JSON pointers [RFC 6901] write / and ~ as ~1 and ~0; in a reference they are percent-encoded.
const toStep = (step: string): string => step.replaceAll('~', '~0').replaceAll('/', '~1');

function fromStep(step: string, from: string): string {
  try {
    return decodeURIComponent(step).replaceAll('~1', '/').replaceAll('~0', '~');
  } catch {
    throw wrong(from, `${step} is not percent-encoded text`);
  }
}

function wrong(pointer: string, problem: string): LockstepError {
  return new LockstepError('REWARD_SETTINGS', `the JSON schema is wrong at ${pointer}: ${problem}`, { pointer });
}
