/** The report in a real browser: it renders, its charts answer the pointer and the keyboard, and nothing is requested. */
import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect } from 'vitest';
import { writeReport } from '../../src/reports/report.js';
import { testWhere } from '../conditions.js';
import { syntheticRun } from '../unit/report-run.js';

const browser = ['chromium', 'chromium-browser', 'google-chrome'].find(
  (name) => spawnSync(name, ['--version']).status === 0,
);
const inBrowser = testWhere(browser !== undefined, 'no chromium installed: apt-get install chromium');

const flags = [
  ...['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--hide-scrollbars'],
  ...['--disable-background-networking', '--disable-component-update', '--disable-sync', '--window-size=1280,1600'],
];

function open(file: string, ...more: string[]): string {
  const profile = mkdtempSync(join(tmpdir(), 'lockstep-browser-'));
  const result = spawnSync(browser!, [...flags, `--user-data-dir=${profile}`, ...more, `file://${file}`], {
    encoding: 'utf8',
    timeout: 90_000,
    maxBuffer: 64 << 20,
  });
  expect(result.error).toBeUndefined();
  return result.stdout;
}

/** The page's document after `script` ran in it; what it puts into `document.title` comes back. */
function ask(page: string, script: string): unknown {
  const file = join(mkdtempSync(join(tmpdir(), 'lockstep-browser-')), 'page.html');
  const probe = `<script>document.title = JSON.stringify((() => { ${script} })());</script>`;
  writeFileSync(file, page.replace('</body>', `${probe}</body>`));
  const dom = open(file, '--dump-dom');
  const title = /<title>([\s\S]*?)<\/title>/.exec(dom)?.[1] ?? '';
  return JSON.parse(title.replaceAll('&lt;', '<').replaceAll('&gt;', '>').replaceAll('&amp;', '&'));
}

describe('the report in a browser', () => {
  inBrowser('draws every chart, on the page and beside each other', async () => {
    const { html } = await writeReport(syntheticRun('ppo'));
    const seen = ask(
      readFileSync(html, 'utf8'),
      `const boxes = [...document.querySelectorAll('figure.chart svg')].map((svg) => svg.getBoundingClientRect());
       const lines = [...document.querySelectorAll('path.line')].map((line) => line.getBBox());
       return {
         charts: boxes.length,
         narrowest: Math.min(...boxes.map((box) => box.width)),
         sideBySide: new Set(boxes.map((box) => Math.round(box.left))).size,
         drawn: lines.filter((box) => box.width > 80).length,
         wide: document.documentElement.scrollWidth <= window.innerWidth,
         requests: performance.getEntriesByType('resource').length,
         hostile: document.querySelectorAll('.sample script, .sample b').length,
       };`,
    ) as Record<string, number | boolean>;
    expect(seen.charts).toBeGreaterThan(10);
    expect(seen.narrowest).toBeGreaterThan(300);
    expect(seen.sideBySide).toBe(3);
    expect(seen.drawn).toBeGreaterThan(15);
    expect(seen.wide).toBe(true);
    expect(seen.requests).toBe(0);
    expect(seen.hostile).toBe(0);
  });

  inBrowser('tells the values at the pointer and at the cursor of the keyboard', async () => {
    const folder = syntheticRun('sft', { steps: 30 });
    const { html } = await writeReport(folder);
    const rows = readFileSync(join(folder, 'metrics.jsonl'), 'utf8')
      .trim()
      .split('\n')
      .map((line) => JSON.parse(line));
    const seen = ask(
      readFileSync(html, 'utf8'),
      `const figure = [...document.querySelectorAll('figure.chart')].find((each) => each.textContent.includes('Gradient norm'));
       const svg = figure.querySelector('svg');
       const box = svg.getBoundingClientRect();
       const tip = () => figure.querySelector('.tip')?.textContent ?? '';
       const before = tip();
       svg.dispatchEvent(new PointerEvent('pointermove', { clientX: box.right - 1, clientY: box.top + 20 }));
       const atEnd = tip();
       const inside = figure.querySelector('.tip').getBoundingClientRect().right <= window.innerWidth;
       svg.dispatchEvent(new KeyboardEvent('keydown', { key: 'Home' }));
       svg.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }));
       const second = tip();
       svg.dispatchEvent(new PointerEvent('pointerleave'));
       return { before, atEnd, inside, second, after: tip(), cursor: figure.querySelector('.cursor').childElementCount };`,
    ) as Record<string, unknown>;
    const norm = (step: number) => Number(rows.find((row) => row.step === step)['gradient.norm'].toPrecision(6));
    expect(seen.before).toBe('');
    expect(seen.atEnd).toBe(`Step 30trained model${norm(30)}`);
    expect(seen.inside).toBe(true);
    expect(seen.second).toBe(`Step 2trained model${norm(2)}`);
    expect(seen.after).toBe('');
    expect(seen.cursor).toBe(0);
  });

  inBrowser('looks different in the dark, and is no blank page in either theme', async () => {
    const { html } = await writeReport(syntheticRun('reward'));
    const picture = (scheme: number) => {
      const file = join(mkdtempSync(join(tmpdir(), 'lockstep-browser-')), 'page.png');
      open(html, `--screenshot=${file}`, `--blink-settings=preferredColorScheme=${scheme}`);
      return readFileSync(file);
    };
    const [dark, light] = [picture(0), picture(1)];
    expect(light.subarray(1, 4).toString()).toBe('PNG');
    expect(light.length).toBeGreaterThan(40_000);
    expect(dark.length).toBeGreaterThan(40_000);
    expect(dark.equals(light)).toBe(false);
  });
});
