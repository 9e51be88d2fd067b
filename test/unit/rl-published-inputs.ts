/** What checks of published literals share: a formula with its cases, and inputs of a case. */
import { type Case, expectClose, flat, type Json, number } from '../rl-fixtures.js';

export interface Formula {
  is(test: Case): boolean;
  check(test: Case): void;
}

export const has = ({ inputs }: Case, ...names: string[]): boolean => names.every((name) => name in inputs);
export const bound = ({ tolerance }: Case): number => number(tolerance);
export const ones = (n: number): number[] => Array<number>(n).fill(1);
export const numbers = ({ inputs }: Case, name: string): number[] => flat(inputs[name]!);

/** A list of rows, also where a case gives the only row as a plain list. */
export const rowsOf = (value: Json): Json[][] =>
  (value as Json[]).some(Array.isArray) ? (value as Json[][]) : [value as Json[]];

/** Name and formula of a case, in lower case: where inputs are the same, only they tell formulas apart. */
export const text = ({ name, formula }: Case): string => `${name}: ${formula}`.toLowerCase();

/** Lengths and mask of the rows of an input; all tokens are learned where a case has no mask. */
export function rowsAndMask({ inputs }: Case, name: string): { lengths: number[]; mask: number[] } {
  const rows = rowsOf(inputs[name]!);
  const lengths = rows.map((row) => row.length);
  return { lengths, mask: inputs.mask === undefined ? ones(rows.flat().length) : flat(inputs.mask) };
}

/** Compares with the numbers that a case prints by that name, if it prints any. */
export function expectPrinted(test: Case, name: string, actual: ArrayLike<number> | number): void {
  const printed = test.expected[name];
  if (printed !== undefined) expectClose(actual, printed, bound(test));
}
