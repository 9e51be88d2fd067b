/**
 * Draws the calls of a step as text, a row for each pool, from a run's trace.json:
 *   node scripts/trace-picture.mjs RUN [STEP] [WIDTH]
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';

const [run, step = '2', width = '72'] = process.argv.slice(2);
const columns = Number(width);
const events = JSON.parse(readFileSync(join(run, 'trace.json'), 'utf8'));
const rowNames = new Map(events.filter(({ ph }) => ph === 'M').map(({ tid, args }) => [tid, args.name]));
const spans = events.filter(({ ph, args }) => ph === 'X' && args?.step === Number(step));
const whole = spans.find(({ name, cat }) => name === 'step' && cat === 'phase');
const surrounding = new Set(['step', 'evaluation', 'checkpoint', 'data', 'offload']);
const calls = spans
  .filter(({ name, cat }) => cat === 'phase' && !surrounding.has(name))
  .sort((a, b) => a.tid - b.tid || a.ts - b.ts);
const columnOf = (microseconds) => Math.round(((microseconds - whole.ts) / whole.dur) * (columns - 1));

/** `[generation....]`, cut to the length of the span. */
function bar(name, length) {
  if (length < 3) return '#'.repeat(Math.max(1, length));
  return `[${name.slice(0, length - 2).padEnd(length - 2, '.')}]`;
}

const rows = new Map();
for (const { tid, name, ts, dur } of calls) {
  const label = rowNames.get(tid)?.replace(/\/calls$/, '') ?? 'all models';
  const row = rows.get(label) ?? ' '.repeat(columns);
  const [begin, end] = [columnOf(ts), columnOf(ts + dur)];
  const text = bar(name, Math.max(1, end - begin));
  rows.set(label, row.slice(0, begin) + text + row.slice(begin + text.length));
}
const margin = Math.max(...[...rows.keys()].map((label) => label.length)) + 2;
for (const [label, row] of rows) console.log(label.padEnd(margin) + row.trimEnd());
console.log(`${' '.repeat(margin)}0 ms${`${(whole.dur / 1000).toFixed(0)} ms`.padStart(columns - 4)}`);
