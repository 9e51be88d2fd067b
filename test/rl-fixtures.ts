/** Reads the cases of test/fixtures/rl (or of LOCKSTEP_FIXTURES) and compares numbers the way their README asks. */
import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';

export type Json = number | string | boolean | null | Json[] | { [key: string]: Json };
export type Ragged = Json[][];

export interface Variant {
  who: string;
  [key: string]: Json;
}

export interface Case {
  name: string;
  formula: string;
  inputs: Record<string, Json>;
  expected: Record<string, Json>;
  gradient?: Gradient | Gradient[];
  variants?: Record<string, Variant>;
  tolerance?: number | string;
}

export interface Gradient {
  wrt: string;
  of: string;
  values: Json[];
}

export interface Topic {
  topic: string;
  batches?: Record<string, Record<string, Json>>;
  cases: Case[];
}

export function readTopics(): Topic[] {
  const root = join(process.env.LOCKSTEP_FIXTURES ?? 'test/fixtures', 'rl');
  const files = readdirSync(root).filter((file) => file.endsWith('.json'));
  return files.map((file) => JSON.parse(readFileSync(join(root, file), 'utf8')) as Topic);
}

/** A test per golden case of each topic, and one that there are cases of all of them. */
export function describeTopics(topics: Readonly<Record<string, (test: Case, topic: Topic) => void | Promise<void>>>) {
  const read = readTopics();
  it('the fixtures hold cases of every topic that is checked', () => {
    expect(read.filter(({ cases }) => cases.length > 0).map(({ topic }) => topic)).toEqual(
      expect.arrayContaining(Object.keys(topics)),
    );
  });
  for (const topic of read.filter((each) => each.topic in topics)) {
    describe(topic.topic, () => {
      for (const test of topic.cases) it(test.name, () => topics[topic.topic]!(test, topic));
    });
  }
}

export const gradientsOf = ({ gradient }: Case): Gradient[] =>
  Array.isArray(gradient) ? gradient : gradient ? [gradient] : [];

export const number = (value: Json | undefined): number =>
  typeof value === 'string' ? Number(value) : (value as number);

/** Every number of a nested list, in order; the strings "NaN" and "Infinity" are numbers. */
export const flat = (value: Json): number[] => (Array.isArray(value) ? value.flatMap(flat) : [number(value)]);

/** The per-token inputs of a case as packed arrays. `poisoned` replaces what the mask leaves out by NaN. */
export class Batch {
  readonly lengths: number[];
  readonly mask: number[];

  constructor(
    private readonly inputs: Record<string, Json>,
    private readonly poisoned: boolean,
    mask = 'response_mask',
  ) {
    const ragged = inputs[mask] as Ragged;
    this.lengths = ragged.map((row) => row.length);
    this.mask = flat(ragged);
  }

  tokens(name: string): number[] {
    return flat(this.inputs[name]!).map((x, t) => (this.poisoned && !this.mask[t] ? Number.NaN : x));
  }

  /** A per-token input, or one number per sequence at each of its tokens. */
  broadcast(name: string): number[] {
    const rows = this.inputs[name] as Json[];
    if (rows.some(Array.isArray)) return this.tokens(name);
    return this.lengths.flatMap((length, b) => Array<number>(length).fill(number(rows[b])));
  }
}

/** Relative 1e-7 of the largest magnitude of the array plus 1e-9, unless an absolute bound is given. */
export function expectClose(actual: ArrayLike<number> | number, expected: Json, bound?: number): void {
  const received = typeof actual === 'number' ? [actual] : Array.from(actual);
  const wanted = flat(expected);
  expect(received.length).toBe(wanted.length);
  const largest = Math.max(0, ...wanted.filter(Number.isFinite).map(Math.abs));
  const tolerance = bound ?? 1e-7 * largest + 1e-9;
  wanted.forEach((want, i) => {
    const got = received[i]!;
    if (!Number.isFinite(want)) expect(got, `element ${i}`).toBe(want);
    else expect(Math.abs(got - want), `element ${i}: ${got} instead of ${want}`).toBeLessThanOrEqual(tolerance);
  });
}
