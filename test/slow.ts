import { test } from 'vitest';

/** Whether the whole suite was asked for: `npm run test:all`. */
export const everything = process.env.LOCKSTEP_TEST_ALL === '1';

/**
 * A test that only the whole suite runs, because it takes long. Elsewhere it is reported as skipped, with the reason in its
 * name.
 */
export function slow(name: string, run: () => void | Promise<void>, milliseconds?: number): void {
  if (everything) test(name, run, milliseconds);
  else test.skip(`${name} [slow: npm run test:all runs it]`, run);
}
