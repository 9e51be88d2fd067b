/**
 * Equality of answers in LaTeX, after the idea of MATH (Hendrycks et al. [2103.03874]): both are brought to one spelling, lists
 * are compared element by element, numbers by value, the rest as text.
 *
 * Equal: \dfrac{1}{2}, \frac12, 1/2, 0.50, 50\% (also equal to 50); 1,234 and 1234; 2\sqrt3 and \sqrt{12}; 5\text{ cm}, 5^\circ and 5;
 * x=5 and 5; (1, \tfrac12) and (1, 0.5). Not equal: expressions in letters that are written otherwise (a+b, b+a), sets in another
 * order, (1,2) and [1,2], words in another case. A comma between three digits separates thousands outside of brackets, elements inside.
 */

import { mathValue } from './math-value.js';
import { sameNumber } from './numbers.js';

/** Relative above 1, absolute below: room for rounding, not for approximation. */
const tolerance = 1e-9;

export function sameMath(given: string, expected: string): boolean {
  return sameNormalised(normalise(given), normalise(expected));
}

function sameNormalised(given: string, expected: string): boolean {
  if (given === expected) return true;
  const [mine, other] = [readings(given), readings(expected)];
  if (mine && other) return sameNumber(mine, other, tolerance);
  const [list, otherList] = [listOf(given), listOf(expected)];
  if (!list || !otherList || list.brackets !== otherList.brackets) return false;
  const { items } = otherList;
  return list.items.length === items.length && list.items.every((item, i) => sameNormalised(item, items[i]!));
}

/** A percentage is itself and its hundredth. */
function readings(text: string): number[] | undefined {
  const percent = text.endsWith('%');
  const value = mathValue(percent ? text.slice(0, -1) : text);
  if (value === undefined) return undefined;
  return percent ? [value, value / 100] : [value];
}

type Rewrite = readonly [pattern: RegExp, replacement: string];

const rewrites: readonly Rewrite[] = [
  // Spacing, delimiters and currency say nothing.
  [/\\left(?![a-z])|\\right(?![a-z])|\\[!,;:> ]|\\quad|\\qquad|~|\\?\$|\\displaystyle/g, ''],
  [/\\[dtc]frac/g, '\\frac'],
  [/\{,\}/g, ''],
  [/−/g, '-'],
  [/π/g, '\\pi'],
  [/×|·|\\times(?![a-z])|\\cdot(?![a-z])/g, '*'],
  [/\\div(?![a-z])/g, '/'],
  [/\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°/g, ''],
  [/\\?%/g, '%'],
  // Words: an answer in words is those words; words at the end are a unit.
  [/\\text\s*\{\s*(?:or|and)\s*\}/g, ','],
  [/^\s*\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}/, '$1'],
  [/\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{[^{}]*\}(?:\s*\^\s*\{?\d\}?)?\s*$/, ''],
  [/\s/g, ''],
  // The left side of an assignment.
  [/^[A-Za-z](?:=|\\in(?![a-z]))/, ''],
  [/\.$/, ''],
  // Arguments without braces.
  [/\\frac(\d)(\d)/g, '\\frac{$1}{$2}'],
  [/\\frac(\d)\{/g, '\\frac{$1}{'],
  [/(\\frac\{[^{}]*\})(\d)/g, '$1{$2}'],
  [/\\sqrt(\d)/g, '\\sqrt{$1}'],
  [/^([A-Za-z]|\d+)\/([A-Za-z]|\d+)$/, '\\frac{$1}{$2}'],
  [/^\+/, ''],
  // Numbers inside of expressions in letters.
  [/(\.\d*?)0+(?!\d)/g, '$1'],
  [/\.(?!\d)/g, ''],
  [/(?<![\d.])\.(\d)/g, '0.$1'],
];

const thousands = /(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])/g;

/** Longer texts are compared as they stand. */
const longestAnswer = 1000;

/** One spelling of an answer. */
export function normalise(text: string): string {
  if (text.length > longestAnswer) return text.trim();
  const hasElements = /[([]|\\\{/.test(text);
  const joined = hasElements ? text : text.replace(thousands, (number) => number.replaceAll(',', ''));
  return rewrites.reduce((result, [pattern, replacement]) => result.replace(pattern, replacement), joined);
}

const pairs: Readonly<Record<string, string>> = { '(': ')', '[': ']', '{': '}' };

/** Elements of a tuple, an interval, a set (\{..\}), or a list without brackets; undefined when no comma separates any. */
function listOf(text: string): { brackets: string; items: string[] } | undefined {
  const plain = splitAtCommas(text);
  if (!plain) return undefined;
  if (plain.length > 1) return { brackets: '', items: plain };
  const enclosed = /^(\(|\[|\\\{)(.*?)(\)|\]|\\\})$/s.exec(text);
  const items = enclosed ? splitAtCommas(enclosed[2]!) : undefined;
  // A set may have one element; a number in parentheses is a number.
  return items && (items.length > 1 || enclosed![1] === '\\{')
    ? { brackets: enclosed![1]! + enclosed![3]!, items }
    : undefined;
}

/** Parts between commas outside of brackets; undefined when brackets do not match (an interval may end in either). */
function splitAtCommas(text: string): string[] | undefined {
  const parts: string[] = [];
  let depth = 0;
  let begin = 0;
  for (let i = 0; i < text.length; i++) {
    const character = text[i]!;
    if (character in pairs) depth++;
    else if (Object.values(pairs).includes(character)) depth--;
    else if (character === ',' && depth === 0) {
      parts.push(text.slice(begin, i));
      begin = i + 1;
    }
    if (depth < 0) return undefined;
  }
  return depth === 0 ? [...parts, text.slice(begin)] : undefined;
}
