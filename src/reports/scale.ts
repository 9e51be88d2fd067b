/** Axes: from values to pixels, and ticks at round numbers. */

export interface Scale {
  (value: number): number;
  ticks: number[];
  minimum: number;
  maximum: number;
}

/** Step sizes of an axis are 1, 2 or 5 times a power of ten. */
function roundStep(span: number, count: number): number {
  const rough = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const lead = rough / power;
  return power * (lead <= 1 ? 1 : lead <= 2 ? 2 : lead <= 5 ? 5 : 10);
}

/** Linear from [minimum, maximum], widened to ticks when `nice`, to the pixels [from, to]. */
export function linearScale(
  [minimum, maximum]: readonly [number, number],
  [from, to]: readonly [number, number],
  { count = 5, nice = true, whole = false } = {},
): Scale {
  let [low, high] = [minimum, maximum];
  if (low === high) {
    const margin = low === 0 ? 1 : Math.abs(low) * 0.1;
    if (nice) [low, high] = [low - margin, high + margin];
    else [low, high] = [low - 0.5, high + 0.5];
  }
  const step = whole ? Math.max(1, roundStep(high - low, count)) : roundStep(high - low, count);
  if (nice) [low, high] = [Math.floor(low / step + 1e-9) * step, Math.ceil(high / step - 1e-9) * step];
  const ticks: number[] = [];
  for (let index = Math.ceil(low / step - 1e-9); index * step <= high + step * 1e-9; index++) {
    ticks.push(Number((index * step).toPrecision(12)));
  }
  const scale = (value: number) => from + ((value - low) / (high - low)) * (to - from);
  return Object.assign(scale, { ticks, minimum: low, maximum: high });
}

/** Base-10 logarithmic, with a tick at each power of ten that fits; values must be positive. */
export function logScale([minimum, maximum]: readonly [number, number], [from, to]: readonly [number, number]): Scale {
  const low = Math.floor(Math.log10(minimum));
  const high = Math.max(low + 1, Math.ceil(Math.log10(maximum)));
  const stride = Math.ceil((high - low) / 5);
  const ticks: number[] = [];
  for (let power = low; power <= high; power += stride) ticks.push(10 ** power);
  const scale = (value: number) => from + ((Math.log10(value) - low) / (high - low)) * (to - from);
  return Object.assign(scale, { ticks, minimum: 10 ** low, maximum: 10 ** high });
}
