/**
 * Numbers in text: signs, thousands separators, decimals, exponents (`1e-3`, `2 × 10^5`), fractions (`3/4`) and percentages.
 * A minus behind a letter, a digit or a bracket subtracts (`10-3` ends in 3); digits inside a word (`GPT4`) are no number.
 */

/** A number that may be read in several ways: `20%` is both 20 and 0.2, as data sets write either. */
export type Readings = readonly number[];

const digits = String.raw`(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+`;
const exponent = String.raw`(?:[eE][-+−]?\d+(?![\p{L}\d])|\s*(?:×|\\times|\*)\s*10\^\{?[-+−]?\d+\}?)?`;
const pattern = new RegExp(
  String.raw`((?<![\p{L}\p{N}_)\]}])[-+−])?(?<![\p{L}\p{N}_.])(${digits})(${exponent})(?:\s*\/\s*(${digits}))?(\s*\\?%)?`,
  'gu',
);

/** The numbers of a text, in order. A fraction over zero is none. */
export function numbersIn(text: string): Readings[] {
  return Array.from(text.matchAll(pattern), readingsOf).filter(([value]) => Number.isFinite(value));
}

function readingsOf([, sign, mantissa, power, denominator, percent]: RegExpMatchArray): Readings {
  const plain = (part: string) => part.replaceAll(',', '');
  const tens = /[-+−]?\d+\}?$/
    .exec(power ?? '')?.[0]
    .replace('−', '-')
    .replace('}', '');
  // Read by Number as a whole: 1 times 1e-3 and the literal 1e-3 can differ in the last bit.
  const top = Number(`${plain(mantissa!)}e${tens === undefined ? 0 : Number(tens)}`);
  const value =
    (sign === '-' || sign === '−' ? -top : top) / (denominator === undefined ? 1 : Number(plain(denominator)));
  return percent === undefined ? [value] : [value, value / 100];
}

/** |x − y| ≤ tolerance · max(1, |y|) for a reading of each. */
export function sameNumber(given: Readings, expected: Readings, tolerance: number): boolean {
  return given.some((x) => expected.some((y) => Math.abs(x - y) <= tolerance * Math.max(1, Math.abs(y))));
}
