/** The summary of a run for a terminal: a few lines with miniature charts of block characters. */
import { distinct } from './catalogue.js';
import { formatNumber, formatSeconds } from './numbers.js';
import type { RunRecord } from './run-record.js';
import { type Point, seriesOf } from './series.js';
import { describeState, summariseRun } from './summary.js';

const blocks = '▁▂▃▄▅▆▇█';

/** Points as one line of `width` characters, each the mean of its share. */
export function sparkline(points: readonly Point[], width: number): string {
  const columns = Math.min(width, points.length);
  const means = Array.from({ length: columns }, (_, column) => {
    const part = points.slice(
      Math.floor((column * points.length) / columns),
      Math.floor(((column + 1) * points.length) / columns),
    );
    return part.reduce((sum, { value }) => sum + value, 0) / part.length;
  });
  const [low, high] = [Math.min(...means), Math.max(...means)];
  const level = (value: number) => (high === low ? 3 : Math.round(((value - low) / (high - low)) * 7));
  return means.map((value) => blocks[level(value)]).join('');
}

/** Lines to print, without the last line break. */
export function terminalSummary(run: RunRecord, { width = 80 } = {}): string {
  const summary = summariseRun(run);
  const lines = [
    `${run.name}: ${summary.algorithm} of ${summary.model}`,
    `${describeState(summary)}${summary.step > 0 && summary.seconds > 0 ? ` in ${formatSeconds(summary.seconds)}` : ''}`,
  ];
  const rest = Object.keys(summary.metrics).filter(
    (name) => !summary.headline.includes(name) && /^(eval\.|reward\.|cost\.|policy\.loss|value\.loss|loss$)/.test(name),
  );
  const shown = distinct([...summary.headline, ...rest].map((name) => seriesOf(run.rows, name)));
  const nameWidth = Math.max(0, ...shown.map(({ key }) => key.length));
  const chartWidth = Math.max(8, Math.min(40, width - nameWidth - 30));
  if (shown.length > 0) lines.push('');
  for (const { key, points } of shown) {
    const { start, end } = summary.metrics[key]!;
    const chart = sparkline(points, chartWidth).padEnd(chartWidth);
    lines.push(`  ${key.padEnd(nameWidth)}  ${chart}  ${formatNumber(start)} -> ${formatNumber(end)}`);
  }
  const phases = Object.entries(summary.phases);
  if (phases.length > 0) {
    const parts = phases.slice(0, 6).map(([name, seconds]) => `${name} ${formatSeconds(seconds)}`);
    lines.push('', `  a step: ${parts.join(', ')}`);
  }
  if (summary.hints.length > 0) lines.push('');
  const marks = { good: '+', notice: '·', warning: '!' };
  for (const { level, text } of summary.hints) lines.push(`  ${marks[level]} ${text}`);
  return lines.join('\n');
}
