/** A run folder as a report: a page that stands alone, a terminal summary, and numbers. */
import { rename, writeFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { LockstepError } from '../errors.js';
import { reportPage } from './page.js';
import { readRun } from './run-record.js';
import { type RunSummary, summariseRun } from './summary.js';
import { terminalSummary } from './terminal.js';

export interface Report {
  /** Absolute path of the page. */
  html: string;
  /** For a terminal. */
  text: string;
  summary: RunSummary;
}

/**
 * Reads a run folder, finished or not, and writes its page: to `html`, or to report.html in the folder.
 *
 * @throws LockstepError RUN_NOT_FOUND; REPORT_WRITE_FAILED.
 */
export async function writeReport(folder: string, options: { html?: string; width?: number } = {}): Promise<Report> {
  const run = await readRun(folder);
  const html = resolve(options.html ?? join(run.folder, 'report.html'));
  try {
    await writeFile(`${html}.writing`, reportPage(run));
    await rename(`${html}.writing`, html);
  } catch (cause) {
    throw new LockstepError(
      'REPORT_WRITE_FAILED',
      `cannot write the report ${html}: ${(cause as Error).message}; name a writable place with --html FILE`,
      { html },
      { cause },
    );
  }
  return {
    html,
    text: terminalSummary(run, options.width ? { width: options.width } : {}),
    summary: summariseRun(run),
  };
}
