import { existsSync, mkdirSync, mkdtempSync, readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { reportPage } from '../../src/reports/page.js';
import { writeReport } from '../../src/reports/report.js';
import { readRun } from '../../src/reports/run-record.js';
import { pairSamples } from '../../src/reports/samples.js';
import { summariseRun } from '../../src/reports/summary.js';
import { terminalSummary } from '../../src/reports/terminal.js';
import { hostileText, type SyntheticKind, syntheticRun } from './report-run.js';

const kinds: SyntheticKind[] = ['ppo', 'sft', 'reward'];

/** Elements that are opened and not closed, or closed in the wrong order; text in style and script does not count. */
function unbalanced(html: string): string[] {
  const markup = html.replace(/<(style|script)([^>]*)>[\s\S]*?<\/\1>/g, '');
  const empty = new Set(['meta', '!doctype']);
  const open: string[] = [];
  const wrong: string[] = [];
  for (const [, close, name] of markup.matchAll(/<(\/?)([a-zA-Z!][a-zA-Z0-9]*)[^>]*>/g)) {
    if (empty.has(name!.toLowerCase())) continue;
    if (!close) open.push(name!);
    else if (open.pop() !== name) wrong.push(name!);
  }
  return [...wrong, ...open];
}

/** What a reader sees, and the data of the charts; without the program and the style. */
const withoutScripts = (html: string) => html.replace(/<(style|script)>[\s\S]*?<\/\1>/g, '');

describe.each(kinds)('the report of a %s run', (kind) => {
  const folder = syntheticRun(kind);

  test('is one well-formed page that loads nothing', async () => {
    const { html } = await writeReport(folder);
    expect(html).toBe(join(folder, 'report.html'));
    const page = readFileSync(html, 'utf8');
    expect(unbalanced(page)).toEqual([]);
    expect(page).not.toMatch(/\b(src|href)=|@import|url\(|\bfetch\(|<link/);
    expect(page.replace('http://www.w3.org/2000/svg', '')).not.toMatch(/https?:/);
    expect(existsSync(`${html}.writing`)).toBe(false);
  });

  test('names every number in charts with a title and a description', async () => {
    const page = reportPage(await readRun(folder));
    const pictures = page.match(/<svg [^>]*role="img"/g) ?? [];
    expect(pictures.length).toBeGreaterThanOrEqual(4);
    expect(page.match(/<title id=/g)?.length).toBe(pictures.length);
    expect(page.match(/<desc id=[^>]*>[^<]*goes from/g)?.length).toBe(pictures.length);
    expect(/NaN|undefined|Infinity/.exec(withoutScripts(page))).toBeNull();
  });

  test('says in its summary what the metrics hold', async () => {
    const run = await readRun(folder);
    const summary = summariseRun(run);
    expect(summary).toMatchObject({ algorithm: kind, step: 100, steps: 100, complete: true, checkpoints: [100] });
    const name = kind === 'ppo' ? 'reward.mean' : 'loss';
    const values = run.rows.flatMap((row) => row[name] ?? []);
    const metric = summary.metrics[name]!;
    expect(metric).toMatchObject({ count: 100, first: values[0], last: values[99] });
    expect(metric.maximum).toBe(Math.max(...values));
    expect(metric.end).toBeCloseTo(values.slice(-10).reduce((a, b) => a + b) / 10, 12);
    expect(terminalSummary(run)).toContain(name);
    expect(() => JSON.stringify(summary)).not.toThrow();
  });
});

describe('a report', () => {
  test('shows the charts of the issue for ppo', async () => {
    const page = reportPage(await readRun(syntheticRun('ppo')));
    for (const title of [
      'Reward',
      'KL to the reference',
      'Value loss',
      'Response length',
      'Policy loss',
      'Time per step',
    ]) {
      expect(page).toContain(`<h3>${title}`);
    }
  });

  test('escapes what models write', async () => {
    const page = reportPage(await readRun(syntheticRun('ppo')));
    expect(page).not.toContain('<script>document.title');
    expect(page).not.toContain('\u0007');
    expect(page).toContain('&lt;/script&gt;&lt;script&gt;document.title');
    expect(hostileText).toContain('\u0007');
  });

  test('puts the same prompt side by side, before and after', async () => {
    const { pairs, before, after } = pairSamples(await readRun(syntheticRun('ppo')))!;
    expect([before, after]).toEqual([0, 100]);
    expect(pairs.map(({ before: earlier, after: later }) => [earlier?.reward, later.reward])).toEqual([
      [-0.4, 2.1],
      [0.3, 1.4],
      [0.1, 1.9],
    ]);
  });

  test('reads a run that is still going and whose last line is cut', async () => {
    const folder = syntheticRun('sft', { done: 37, cut: true });
    const run = await readRun(folder);
    expect(run.rows.at(-1)?.step).toBe(36);
    expect(run.unreadableLines).toBe(1);
    const summary = summariseRun(run);
    expect(summary).toMatchObject({ complete: false, step: 36, steps: 100 });
    expect(terminalSummary(run)).toContain('36 of 100 steps done');
    expect(unbalanced(reportPage(run))).toEqual([]);
  });

  test('stands for a run without rows, without samples, with one row', async () => {
    const folder = join(mkdtempSync(join(tmpdir(), 'lockstep-report-')), 'young');
    mkdirSync(folder);
    writeFileSync(join(folder, 'config.yaml'), 'algorithm: sft\nmodel: m\nsteps: 10\n');
    expect(reportPage(await readRun(folder))).toContain('no metrics yet');
    writeFileSync(join(folder, 'metrics.jsonl'), '{"step":1,"loss":2,"seconds.forward":1}\n');
    const page = reportPage(await readRun(folder));
    expect(unbalanced(page)).toEqual([]);
    expect(/NaN|Infinity/.exec(page)).toBeNull();
  });

  test.each(['nothing here', 'an empty folder'])('of %s is refused by name', async (what) => {
    const parent = mkdtempSync(join(tmpdir(), 'lockstep-report-'));
    const folder = what === 'an empty folder' ? parent : join(parent, 'missing');
    await expect(readRun(folder)).rejects.toMatchObject({
      code: 'RUN_NOT_FOUND',
      message: expect.stringContaining(folder),
    });
  });

  test('that cannot be written says where', async () => {
    const folder = syntheticRun('sft');
    const html = join(folder, 'metrics.jsonl', 'report.html');
    await expect(writeReport(folder, { html })).rejects.toMatchObject({
      code: 'REPORT_WRITE_FAILED',
      message: expect.stringContaining(html),
    });
  });
});
