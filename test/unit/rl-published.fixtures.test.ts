/** Every literal that other projects' tests and papers print. */
import { describe, expect, it } from 'vitest';
import { type Case, readTopics } from '../rl-fixtures.js';
import { published } from './rl-published-cases.js';

const cases = readTopics().flatMap(({ topic, cases }) => (topic === 'published' ? cases : []));

/** An object that notes in `read` which of its properties are looked at. */
const noting = <T extends object>(target: T, read: Set<string>): T =>
  new Proxy(target, {
    get(object, key, receiver) {
      read.add(String(key));
      return Reflect.get(object, key, receiver);
    },
  });

/** Runs a check, which must look at every number that the case prints. */
function checkWhole(test: Case, check: (test: Case) => void): void {
  const read = new Set<string>();
  check(noting({ ...test, expected: noting(test.expected, read) }, read));
  const printed = [...Object.keys(test.expected), ...(test.gradient ? ['gradient'] : [])];
  expect(printed).not.toEqual([]);
  expect(printed.filter((name) => !read.has(name))).toEqual([]);
}

describe('published', () => {
  for (const test of cases) {
    const formula = Object.values(published).find(({ is }) => is(test));
    if (formula) it(test.name, () => checkWhole(test, formula.check));
  }
  it('every case has a check', () => {
    expect(cases.length).toBeGreaterThan(0);
    const tables = Object.values(published);
    expect(cases.filter((test) => !tables.some(({ is }) => is(test))).map(({ name }) => name)).toEqual([]);
  });
  it('a number that no check looks at is an error', () => {
    const test: Case = { name: 'two', formula: '', inputs: {}, expected: { a: 1, b: 2 } };
    expect(() => checkWhole(test, ({ expected }) => expect(expected.a).toBe(1))).toThrow(/b/);
  });
});
