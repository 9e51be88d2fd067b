/** The one way in which a test may not run: what it needs is not here, and its name says what. */
import { test } from 'vitest';

/** Whether the whole suite was asked for: `npm run test:all`. */
export const everything = process.env.LOCKSTEP_TEST_ALL === '1';

type Declare = (name: string, run: () => void | Promise<void>, milliseconds?: number) => void;

/** Declares tests that run where `holds`; elsewhere they are reported as skipped, with `otherwise` in their names. */
export function testWhere(holds: boolean, otherwise: string): Declare {
  return (name, run, milliseconds) =>
    holds ? test(name, run, milliseconds) : test.skip(`${name} [${otherwise}]`, run, milliseconds);
}

/** A test that only the whole suite runs, because it takes long. */
export const slow = testWhere(everything, 'slow: npm run test:all runs it');
