/**
 * Added tokens (special ones among them) are cut out of the text before anything else sees it: leftmost-longest matches, first
 * of those written as they stand, then, in the normalised rest, of those marked `normalized`
 * (huggingface/tokenizers, `added_vocabulary.rs`).
 */

/** One entry of `added_tokens` in tokenizer.json. */
export interface AddedToken {
  id: number;
  content: string;
  special: boolean;
  /** Only between non-word characters. */ singleWord: boolean;
  /** Swallows white space before it. */ lstrip: boolean;
  /** Swallows white space after it. */ rstrip: boolean;
  /** Matched in normalised text instead of raw text. */ normalized: boolean;
}

/** A stretch [start, end) of a text: an added token, or text between them. */
export interface TextSection {
  start: number;
  end: number;
  added?: AddedToken;
}

const wordBefore = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d]$/u;
const wordAfter = /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\u200c\u200d]/u;
const spaceBefore = /\p{White_Space}+$/u;
const spaceAfter = /^\p{White_Space}+/u;

/** Reads the `added_tokens` section; unknown extra fields are ignored. */
export function readAddedTokens(section: unknown): AddedToken[] {
  return ((section as Record<string, unknown>[] | undefined) ?? []).map((token) => ({
    id: Number(token.id),
    content: String(token.content),
    special: token.special === true,
    singleWord: token.single_word === true,
    lstrip: token.lstrip === true,
    rstrip: token.rstrip === true,
    normalized: typeof token.normalized === 'boolean' ? token.normalized : token.special !== true,
  }));
}

/** A splitter for `tokens`, each recognised by its `spelling` (their content, or their normalised content). */
export function addedTokenSplitter(
  tokens: readonly AddedToken[],
  spelling: (token: AddedToken) => string = (token) => token.content,
): (text: string) => TextSection[] {
  const bySpelling = new Map<string, AddedToken>();
  for (const token of tokens) if (spelling(token) !== '') bySpelling.set(spelling(token), token);
  if (bySpelling.size === 0) return (text) => (text === '' ? [] : [{ start: 0, end: text.length }]);
  const spellings = [...bySpelling.keys()].sort((a, b) => b.length - a.length);
  const pattern = new RegExp(spellings.map(escapeRegExp).join('|'), 'gu');
  return (text) => {
    const sections: TextSection[] = [];
    let done = 0;
    for (const match of text.matchAll(pattern)) {
      const added = bySpelling.get(match[0])!;
      let start = match.index;
      let end = start + match[0].length;
      if (start < done) continue;
      if (added.singleWord && (wordBefore.test(text.slice(0, start)) || wordAfter.test(text.slice(end)))) continue;
      if (added.lstrip) start = Math.max(done, start - (spaceBefore.exec(text.slice(0, start))?.[0].length ?? 0));
      if (added.rstrip) end += spaceAfter.exec(text.slice(end))?.[0].length ?? 0;
      if (start > done) sections.push({ start: done, end: start });
      sections.push({ start, end, added });
      done = end;
    }
    if (done < text.length) sections.push({ start: done, end: text.length });
    return sections;
  };
}

/** The text as a regular expression that matches exactly it. */
export function escapeRegExp(text: string): string {
  return text.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&');
}
