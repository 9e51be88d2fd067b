/** The HTML report: one file, nothing loaded from anywhere, readable in light and dark and without a script. */
import { chartsOf } from './catalogue.js';
import { chartFigure, miniature } from './chart.js';
import { element, escapeText } from './markup.js';
import { formatNumber, formatSeconds } from './numbers.js';
import { pageScript } from './page-script.js';
import { pageStyle } from './page-style.js';
import type { RunRecord } from './run-record.js';
import { samplesSection } from './samples.js';
import { seriesOf } from './series.js';
import { describeState, type RunSummary, summariseRun } from './summary.js';

/** Forbids every request: what the page needs is in it. */
const policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'";

export function reportPage(run: RunRecord): string {
  const summary = summariseRun(run);
  const title = `${run.name} · ${summary.algorithm} · Lockstep`;
  return [
    '<!doctype html>',
    '<html lang="en">',
    '<head>',
    '<meta charset="utf-8">',
    `<meta http-equiv="Content-Security-Policy" content="${policy}">`,
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    '<meta name="color-scheme" content="light dark">',
    `<title>${escapeText(title)}</title>`,
    `<style>${pageStyle}</style>`,
    '</head>',
    '<body>',
    header(run, summary),
    '<main>',
    tiles(run, summary),
    hints(summary),
    charts(run),
    samplesSection(run),
    configuration(run),
    '</main>',
    `<script>${pageScript}</script>`,
    '</body>',
    '</html>',
    '',
  ].join('\n');
}

function header(run: RunRecord, summary: RunSummary): string {
  const facts = [
    ['Algorithm', summary.algorithm],
    ['Model', summary.model],
    ['Steps', describeState(summary)],
    ['Time', summary.seconds > 0 ? formatSeconds(summary.seconds) : undefined],
    ['Compute', typeof run.config.dtype === 'string' ? run.config.dtype : undefined],
    ['Seed', typeof run.config.seed === 'number' ? String(run.config.seed) : undefined],
    ['Checkpoints', summary.checkpoints.length > 0 ? `steps ${summary.checkpoints.join(', ')}` : undefined],
  ].filter((fact): fact is [string, string] => fact[1] !== undefined);
  return element(
    'header',
    {},
    element('p', { class: 'brand' }, 'Lockstep run report'),
    element('h1', {}, escapeText(run.name)),
    element(
      'dl',
      {},
      ...facts.map(([name, value]) => `<div>${element('dt', {}, name)}${element('dd', {}, escapeText(value))}</div>`),
    ),
  );
}

function tiles(run: RunRecord, { headline, metrics }: RunSummary): string {
  if (headline.length === 0) return element('p', { class: 'lead' }, 'This run has no metrics yet.');
  const tile = (name: string) => {
    const { start, end, count } = metrics[name]!;
    return element(
      'div',
      { class: 'tile' },
      element('h3', {}, escapeText(name)),
      element('p', { class: 'value' }, escapeText(formatNumber(end))),
      element('p', { class: 'from' }, count > 1 ? `from ${escapeText(formatNumber(start))}` : 'measured once'),
      miniature(seriesOf(run.rows, name)),
    );
  };
  return element('section', { class: 'tiles', 'aria-label': 'Summary' }, ...headline.slice(0, 6).map(tile));
}

function hints({ hints: list }: RunSummary): string {
  if (list.length === 0) return '';
  const words = { good: 'Good', notice: 'Notice', warning: 'Warning' };
  return element(
    'section',
    { id: 'health' },
    element('h2', {}, 'Health'),
    element(
      'ul',
      { class: 'hints' },
      ...list.map(({ level, text }) =>
        element('li', { class: level }, element('strong', {}, words[level]), element('span', {}, escapeText(text))),
      ),
    ),
  );
}

function charts(run: RunRecord): string {
  const list = chartsOf(run);
  if (list.length === 0) return '';
  return element(
    'section',
    { id: 'charts' },
    element('h2', {}, 'Curves'),
    element('div', { class: 'charts' }, ...list.map((chart, index) => chartFigure(chart, `chart-${index}`))),
  );
}

function configuration(run: RunRecord): string {
  const rows = flatten(run.config);
  if (rows.length === 0) return '';
  return element(
    'section',
    { id: 'configuration' },
    element('h2', {}, 'Configuration'),
    element(
      'details',
      {},
      element('summary', {}, `${rows.length} settings, as resolved`),
      element(
        'table',
        {},
        element(
          'tbody',
          {},
          ...rows.map(
            ([name, value]) =>
              `<tr>${element('th', { scope: 'row' }, escapeText(name))}${element('td', {}, escapeText(value))}</tr>`,
          ),
        ),
      ),
    ),
  );
}

/** Nested settings as `path.to.key` and text. */
function flatten(value: unknown, path = ''): [string, string][] {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) {
    return Object.entries(value).flatMap(([key, child]) => flatten(child, path ? `${path}.${key}` : key));
  }
  return path === '' ? [] : [[path, typeof value === 'string' ? value : JSON.stringify(value)]];
}
