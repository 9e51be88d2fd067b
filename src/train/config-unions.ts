/**
 * Which alternative of a union a value was meant to be. The issues of that one say what is wrong; those of all alternatives say
 * little.
 */
import type { z } from 'zod';

export type Issue = z.core.$ZodIssue;

/** Issues of unions replaced by those of the alternative that was meant, where one can be told. */
export function explainUnions(issues: readonly Issue[], input: unknown): Issue[] {
  return issues.flatMap((issue) => (issue.code === 'invalid_union' ? explainUnion(issue, input) : [issue]));
}

export function at(input: unknown, path: readonly PropertyKey[]): unknown {
  return path.reduce<unknown>(
    (node, key) =>
      typeof node === 'object' && node !== null ? (node as Record<PropertyKey, unknown>)[key] : undefined,
    input,
  );
}

interface Alternative {
  issues: readonly Issue[];
  /** Keys of the value that it does not know. */
  unknown: readonly string[];
  /** Keys that it needs and the value lacks. */
  missing: readonly string[];
}

function explainUnion(union: Extract<Issue, { code: 'invalid_union' }>, input: unknown): Issue[] {
  const { path } = union;
  const value = at(input, path);
  const possible = union.errors
    .filter((issues) => !issues.some(isOtherKind))
    .map((issues) => alternative(issues, value));
  const misfit = ({ unknown, missing }: Alternative) => unknown.length + missing.length;
  const least = Math.min(...possible.map(misfit));
  const [meant, ...others] = possible.filter((one) => misfit(one) === least);
  if (!meant) return [union];
  const close = [meant, ...others];
  const unknown = [...new Set(close.flatMap((one) => one.unknown))];
  const missing = [...new Set(close.flatMap((one) => one.missing))];
  const toAll = unknown.filter((key) => close.every((one) => one.unknown.includes(key)));
  if (others.length > 0 && toAll.length > 0) {
    return [{ code: 'unrecognized_keys', keys: toAll, path, message: '' }];
  }
  if (others.length > 0 && least > 0) {
    const clash = close.every((one) => one.unknown.length > 0);
    const message = clash ? `only one of the keys ${unknown.join(', ')}` : `one of the keys ${missing.join(', ')}`;
    return [{ code: 'custom', message, path }];
  }
  const own = meant.issues.map((issue) => ({ ...issue, path: [...path, ...issue.path] }));
  return explainUnions(own, input);
}

/** The value is no object where one is needed, or the like. */
function isOtherKind({ code, path }: Issue): boolean {
  return path.length === 0 && code !== 'unrecognized_keys' && code !== 'custom';
}

function alternative(issues: readonly Issue[], value: unknown): Alternative {
  return {
    issues,
    unknown: issues.flatMap((issue) =>
      issue.code === 'unrecognized_keys' && issue.path.length === 0 ? issue.keys : [],
    ),
    missing: issues
      .filter(({ path }) => path.length === 1 && at(value, path) === undefined)
      .map(({ path }) => String(path[0])),
  };
}
