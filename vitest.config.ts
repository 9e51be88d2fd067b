import { defineConfig } from 'vitest/config';

/** Rooms of tests by what they need, in the order they run: a broken unit is told before a minute of end-to-end tests. */
const rooms = [
  { name: 'sanity', seconds: 120 },
  { name: 'unit', seconds: 20 },
  { name: 'contracts', seconds: 240 },
  { name: 'native', seconds: 120 },
  { name: 'cluster', seconds: 120 },
  { name: 'gpu', seconds: 300 },
  { name: 'e2e', seconds: 600 },
];

const report = process.env.LOCKSTEP_TEST_REPORT;

export default defineConfig({
  test: {
    pool: 'forks',
    globalSetup: 'test/global-setup.ts',
    reporters: report ? ['default', ['json', { outputFile: report }]] : ['default'],
    projects: rooms.map(({ name, seconds }, order) => ({
      test: {
        name,
        include: [`test/${name}/**/*.test.ts`],
        pool: 'forks' as const,
        testTimeout: seconds * 1000,
        hookTimeout: seconds * 1000,
        teardownTimeout: 10_000,
        // End-to-end tests measure seconds and signals: nothing else runs beside them.
        maxWorkers: name === 'e2e' ? 1 : 2,
        sequence: { groupOrder: order },
      },
    })),
  },
});
