/**
 * Which tokens stand for which characters. Tokens spell the text as normalisation and pre-tokenisation leave it (their
 * surface); a place in the text is found there by how far the surface of the text before it agrees with the surface of the
 * whole. A character composed across the place counts as behind it.
 */
import type { TextSection } from './added-tokens.js';
import { byteOfFallbackToken } from './decoder.js';

/** Encoded text in which every stretch knows where it came from. */
export interface EncodedSection extends TextSection {
  /** Token strings of this stretch. */
  tokens: string[];
  ids: number[];
  /** What the tokens spell: the stretch after normalisation and pre-tokenisation. */
  surface: string;
}

/** What alignment needs to know of an encoder. */
export interface Aligner {
  /** What the tokens of a stretch of text will spell; `first`: the text begins with it. */
  surfaceOf(text: string, first: boolean): string;
  /** The unknown token. */
  unknown: string | undefined;
  /** Suffix of the last token of a word. */
  wordEnd: string | undefined;
  byteFallback: boolean;
}

/** First and last + 1 index of the tokens that touch characters [start, end) of `text`, over all its sections in order. */
export function tokenRange(
  aligner: Aligner,
  text: string,
  sections: readonly EncodedSection[],
  start: number,
  end: number,
): [number, number] {
  let from = 0;
  let to = 0;
  let before = 0;
  for (const section of sections) {
    const count = section.ids.length;
    if (section.end <= start) from = before + count;
    else if (section.start < start) from = before + tokensBefore(aligner, text, section, start, 'ended');
    if (section.end <= end) to = before + count;
    else if (section.start < end) to = before + tokensBefore(aligner, text, section, end, 'begun');
    before += count;
  }
  return [from, Math.max(from, to)];
}

/** Tokens of a section that have ended at, or begun before, character `at` strictly inside it. */
function tokensBefore(
  aligner: Aligner,
  text: string,
  section: EncodedSection,
  at: number,
  which: 'ended' | 'begun',
): number {
  if (section.added) return which === 'begun' ? 1 : 0;
  const head = aligner.surfaceOf(text.slice(section.start, at), section.start === 0);
  const boundary = Buffer.byteLength(commonPrefix(head, section.surface), 'utf8');
  const ends = tokenEnds(aligner, section);
  let count = 0;
  while (count < ends.length && (which === 'ended' ? ends[count]! <= boundary : (ends[count - 1] ?? 0) < boundary)) {
    count++;
  }
  return count;
}

/** Where each token of a plain section ends, in bytes of the surface's UTF-8. */
function tokenEnds(aligner: Aligner, section: EncodedSection): number[] {
  const surface = Buffer.from(section.surface, 'utf8');
  const spellings = section.tokens.map((token) => bytesOf(aligner, token));
  let at = 0;
  return spellings.map((bytes, i) => {
    if (typeof bytes === 'number') {
      at += bytes;
    } else if (bytes && surface.subarray(at, at + bytes.length).equals(bytes)) {
      at += bytes.length;
    } else {
      // An unknown token covers everything up to where its successor is found.
      const next = spellings[i + 1];
      const found = next instanceof Buffer ? surface.indexOf(next, at + 1) : -1;
      at = found >= 0 ? found : spellings.length === i + 1 ? surface.length : at;
    }
    return at;
  });
}

/** A token's UTF-8, the number of bytes it stands for, or undefined for an unknown token. */
function bytesOf(aligner: Aligner, token: string): Buffer | number | undefined {
  if (aligner.byteFallback && byteOfFallbackToken(token) !== undefined) return 1;
  if (token === aligner.unknown) return undefined;
  const suffix = aligner.wordEnd;
  return Buffer.from(suffix && token.endsWith(suffix) ? token.slice(0, -suffix.length) : token, 'utf8');
}

function commonPrefix(a: string, b: string): string {
  let length = 0;
  while (length < a.length && length < b.length && a[length] === b[length]) length++;
  const last = a.charCodeAt(length - 1);
  if (length > 0 && last >= 0xd800 && last <= 0xdbff) length--;
  return a.slice(0, length);
}
