#!/usr/bin/env node
// Adds up vitest's JSON reports: `sum-tests.mjs REPORT...` prints one line, "N passed, N failed, N skipped".
// A report that is missing or cut short means that its run broke: it counts as one failure. Each failure is named first, so
// that the end of a long log says what went wrong.
import { readFileSync } from 'node:fs';
import { relative } from 'node:path';

const total = { passed: 0, failed: 0, skipped: 0 };

/** Prints one failure: the file, the test and the first lines of what it said. */
function name(file, title, message) {
  const said = (message ?? '').split('\n').slice(0, 12).join('\n  ');
  process.stdout.write(`FAILED ${relative('.', file)}${title ? ` > ${title}` : ''}\n  ${said}\n`);
}

for (const file of process.argv.slice(2)) {
  try {
    const report = JSON.parse(readFileSync(file, 'utf8'));
    total.passed += report.numPassedTests;
    // A file that fails to load fails no test of its own: it is a failed suite without assertions.
    const brokenFiles = report.testResults.filter(
      (suite) => suite.status === 'failed' && suite.assertionResults.length === 0,
    );
    total.failed += report.numFailedTests + brokenFiles.length;
    for (const suite of brokenFiles) name(suite.name, '', suite.message);
    for (const suite of report.testResults) {
      for (const test of suite.assertionResults) {
        if (test.status === 'failed') name(suite.name, test.fullName, test.failureMessages?.[0]);
      }
    }
    total.skipped += report.numPendingTests + report.numTodoTests;
    if (!report.success && report.numFailedTests + brokenFiles.length === 0) total.failed += 1;
  } catch (error) {
    process.stdout.write(`FAILED ${file}: the report cannot be read: ${error.message}\n`);
    total.failed += 1;
  }
}
process.stdout.write(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped\n`);
process.exit(total.failed === 0 ? 0 : 1);
