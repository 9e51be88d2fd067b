/**
 * Charts as self-contained SVG: lines with dots for sparse series, and stacked areas. Colours are CSS variables of the
 * page; the data for the tooltip travels in a JSON element beside the picture.
 */
import type { ChartSpec } from './catalogue.js';
import { element, embeddedJson, escapeText, pixel } from './markup.js';
import { formatNumber } from './numbers.js';
import { linearScale, logScale, type Scale } from './scale.js';
import { type Point, type Series, smooth, summarise, thin } from './series.js';

const width = 400;
const height = 185;
const margin = { left: 46, right: 12, top: 10, bottom: 24 };
/** Past this many points the raw curve fades behind its moving average. */
const smoothFrom = 40;
/** A positive series that spans more than this is drawn on a logarithmic axis. */
const logarithmicSpan = 1000;

interface Layer {
  series: Series;
  /** What is drawn, at the height where it is drawn. */
  points: Point[];
  /** The lower edge of a stacked area. */
  base?: Point[];
}

/** A figure with heading, legend, picture and tooltip data; `id` must be unique in the page. */
export function chartFigure(chart: ChartSpec, id: string): string {
  const layers = chart.kind === 'stack' ? stack(chart.series) : chart.series.map(line);
  const x = stepScale(layers);
  const y = valueScale(layers, chart.fromZero === true);
  const drawn = layers.map((layer, index) =>
    layer.base ? area(layer, x, y, index) : curve(layer, x, y, { index, exact: chart.exact === true }),
  );
  const data = {
    plot: [margin.left, margin.top, width - margin.right, height - margin.bottom],
    series: layers.map(({ series, points }) => ({
      label: series.label,
      points: points.map(({ step }, index) => [
        step,
        Number(pixel(x(step))),
        Number(pixel(y(points[index]!.value))),
        Number(thinned(series)[index]!.value.toPrecision(6)),
      ]),
    })),
  };
  const picture = element(
    'svg',
    { viewBox: `0 0 ${width} ${height}`, role: 'img', tabindex: 0, 'aria-labelledby': `${id}-title ${id}-text` },
    element('title', { id: `${id}-title` }, escapeText(chart.title)),
    element('desc', { id: `${id}-text` }, escapeText(describe(chart))),
    axes(x, y),
    ...drawn,
    element('g', { class: 'cursor' }),
  );
  return element(
    'figure',
    { class: 'chart', id },
    element(
      'h3',
      {},
      escapeText(chart.title),
      chart.unit ? element('span', { class: 'unit' }, escapeText(chart.unit)) : '',
    ),
    element('p', { class: 'note' }, escapeText(chart.note)),
    layers.length > 1 ? legend(layers) : '',
    picture,
    `<script type="application/json">${embeddedJson(data)}</script>`,
  );
}

/** A line without axes, for a tile. */
export function miniature({ points }: Series): string {
  if (points.length < 2) return '';
  const shown = thin(smooth(points, Math.max(1, points.length / 15)), 120);
  const values = shown.map(({ value }) => value);
  const x = linearScale([shown[0]!.step, shown.at(-1)!.step], [2, 118], { nice: false });
  const y = linearScale([Math.min(...values), Math.max(...values)], [30, 2], { nice: false });
  return element(
    'svg',
    { class: 'miniature', viewBox: '0 0 120 32', 'aria-hidden': 'true' },
    element('path', { d: path(shown, x, y), class: 'line s0' }),
  );
}

function thinned(series: Series): Point[] {
  return thin(series.points);
}

function line(series: Series): Layer {
  return { series, points: thinned(series) };
}

/** Areas on top of each other: series without a point at a step count as zero there. */
function stack(series: readonly Series[]): Layer[] {
  const steps = thin(series[0]!.points).map(({ step }) => step);
  let base = steps.map((step) => ({ step, value: 0 }));
  return series.map((each) => {
    const at = new Map(each.points.map(({ step, value }) => [step, value]));
    const own = steps.map((step) => ({ step, value: at.get(step) ?? 0 }));
    const points = own.map(({ step, value }, index) => ({ step, value: value + base[index]!.value }));
    const layer = { series: { ...each, points: own }, points, base };
    base = points;
    return layer;
  });
}

function stepScale(layers: readonly Layer[]): Scale {
  const ends = layers.flatMap(({ points }) => [points[0]!.step, points.at(-1)!.step]);
  const range = [Math.min(...ends), Math.max(...ends)] as const;
  return linearScale(range, [margin.left, width - margin.right], { count: 5, nice: false, whole: true });
}

function valueScale(layers: readonly Layer[], fromZero: boolean): Scale {
  const values = layers.flatMap(({ points }) => points.map(({ value }) => value));
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pixels = [height - margin.bottom, margin.top] as const;
  if (low > 0 && high / low > logarithmicSpan && layers.every(({ base }) => base === undefined)) {
    return logScale([low, high], pixels);
  }
  return linearScale(fromZero ? [Math.min(0, low), Math.max(0, high)] : [low, high], pixels);
}

function path(points: readonly Point[], x: Scale, y: Scale): string {
  return points.map(({ step, value }, index) => `${index ? 'L' : 'M'}${pixel(x(step))} ${pixel(y(value))}`).join('');
}

function curve(
  { series, points }: Layer,
  x: Scale,
  y: Scale,
  { index, exact }: { index: number; exact: boolean },
): string {
  const dots = (radius: number) =>
    points
      .map(({ step, value }) => element('circle', { cx: x(step), cy: y(value), r: radius, class: `dot s${index}` }))
      .join('');
  const raw = (style: string) => element('path', { d: path(points, x, y), class: `${style} s${index}` });
  if (series.sparse || points.length === 1) return raw('line thin') + dots(3.5);
  if (exact || series.points.length < smoothFrom) return raw('line');
  const average = thin(smooth(series.points, Math.max(8, series.points.length / 25)));
  return raw('line raw') + element('path', { d: path(average, x, y), class: `line s${index}` });
}

function area({ points, base }: Layer, x: Scale, y: Scale, index: number): string {
  const lower = [...base!].reverse();
  const outline = points.length === 1 ? widen(points, base!) : [...points, ...lower];
  return element('path', { d: `${path(outline, x, y)}Z`, class: `area s${index}` });
}

/** One step has no width of its own: it becomes a bar. */
function widen([top]: readonly Point[], [bottom]: readonly Point[]): Point[] {
  const [left, right] = [top!.step - 0.25, top!.step + 0.25];
  return [
    { step: left, value: top!.value },
    { step: right, value: top!.value },
    { step: right, value: bottom!.value },
    { step: left, value: bottom!.value },
  ];
}

function axes(x: Scale, y: Scale): string {
  const [left, right, bottom] = [margin.left, width - margin.right, height - margin.bottom];
  const rows = y.ticks.map((tick) => {
    const at = y(tick);
    const style = tick === 0 ? 'grid zero' : 'grid';
    return (
      element('line', { x1: left, x2: right, y1: at, y2: at, class: style }) +
      element('text', { x: left - 6, y: at + 4, 'text-anchor': 'end' }, escapeText(formatNumber(tick)))
    );
  });
  const columns = x.ticks.map((tick) =>
    element('text', { x: x(tick), y: bottom + 17, 'text-anchor': 'middle' }, escapeText(formatNumber(tick, 6))),
  );
  return element('g', { class: 'axes', 'aria-hidden': 'true' }, ...rows, ...columns);
}

function legend(layers: readonly Layer[]): string {
  const entries = layers.map(({ series }, index) =>
    element('li', {}, element('span', { class: `key s${index}` }), escapeText(series.label)),
  );
  return element('ul', { class: 'legend' }, ...entries);
}

function describe(chart: ChartSpec): string {
  const parts = chart.series.map((series) => {
    const { start, end, minimum, maximum } = summarise(series)!;
    return `${series.label} goes from ${formatNumber(start)} to ${formatNumber(end)} (between ${formatNumber(minimum)} and ${formatNumber(maximum)})`;
  });
  return `${chart.note} ${parts.join('; ')}.`;
}
