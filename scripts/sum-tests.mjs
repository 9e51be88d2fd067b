#!/usr/bin/env node
// Adds up vitest's JSON reports: `sum-tests.mjs REPORT...` prints one line, "N passed, N failed, N skipped".
// A report that is missing or cut short means that its run broke: it counts as one failure.
import { readFileSync } from 'node:fs';

const total = { passed: 0, failed: 0, skipped: 0 };
for (const file of process.argv.slice(2)) {
  try {
    const report = JSON.parse(readFileSync(file, 'utf8'));
    total.passed += report.numPassedTests;
    // A file that fails to load fails no test of its own: it is a failed suite without assertions.
    const brokenFiles = report.testResults.filter(
      (suite) => suite.status === 'failed' && suite.assertionResults.length === 0,
    );
    total.failed += report.numFailedTests + brokenFiles.length;
    total.skipped += report.numPendingTests + report.numTodoTests;
    if (!report.success && report.numFailedTests + brokenFiles.length === 0) total.failed += 1;
  } catch {
    total.failed += 1;
  }
}
process.stdout.write(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped\n`);
process.exit(total.failed === 0 ? 0 : 1);
