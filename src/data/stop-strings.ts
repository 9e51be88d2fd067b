/** Ends generations at strings: watches texts as tokens arrive and cuts them at the first stop string. */
import { LockstepError } from '../errors.js';
import { generatedStream } from './generated-text.js';
import type { Tokenizer, TokenStream } from './tokenizer.js';

/** Where a text ended. */
export interface StopCut {
  /** Tokens up to and with the one that completed the stop string. */
  tokens: number;
  /** The text before the stop string. */
  text: string;
}

/**
 * Looks for the strings in `count` generations; undefined without strings. `key` is the setting that holds them.
 * Errors: `TOKENIZER_MISSING`.
 */
export function watchStops(
  stops: readonly string[] = [],
  tokenizer: Tokenizer | undefined,
  count: number,
  key: string,
): StopStrings | undefined {
  if (stops.length === 0) return undefined;
  if (tokenizer) return new StopStrings(tokenizer, stops, count);
  throw new LockstepError(
    'TOKENIZER_MISSING',
    `${key}: strings to stop at need a tokenizer, and the model has no tokenizer.json; add the model's tokenizer files, or leave out ${key}`,
    { key },
  );
}

interface Watched {
  stream: TokenStream;
  text: string;
  tokens: number;
  cut: StopCut | undefined;
}

/**
 * Follows `count` generations. Tokens that arrive after a stop string, because the request to stop takes time, are
 * ignored, so the result depends on the tokens only.
 */
export class StopStrings {
  readonly #stops: readonly string[];
  readonly #watched: Watched[];

  constructor(tokenizer: Tokenizer, stops: readonly string[], count: number) {
    this.#stops = stops;
    this.#watched = Array.from({ length: count }, () => ({
      stream: generatedStream(tokenizer),
      text: '',
      tokens: 0,
      cut: undefined,
    }));
  }

  /** Takes new tokens, entry i belonging to generation `requests[i]`; returns the generations to end now. */
  push(requests: ArrayLike<number>, tokens: ArrayLike<number>): number[] {
    const ended: number[] = [];
    for (let i = 0; i < tokens.length; i++) {
      const request = requests[i]!;
      if (!this.#watched[request]!.cut && this.#feed(request, tokens[i]!)) ended.push(request);
    }
    return ended;
  }

  /** The cut of a whole generation, tokens that were never pushed included; undefined when no stop string is in it. */
  finish(request: number, tokens: ArrayLike<number>): StopCut | undefined {
    const watched = this.#watched[request]!;
    while (!watched.cut && watched.tokens < tokens.length) this.#feed(request, tokens[watched.tokens]!);
    return watched.cut;
  }

  #feed(request: number, token: number): boolean {
    const watched = this.#watched[request]!;
    const before = watched.text.length;
    watched.text += watched.stream.push(token);
    watched.tokens++;
    const starts = this.#stops.flatMap((stop) => {
      const at = watched.text.indexOf(stop, Math.max(0, before - stop.length + 1));
      return at < 0 ? [] : [at];
    });
    if (starts.length === 0) return false;
    watched.cut = { tokens: watched.tokens, text: watched.text.slice(0, Math.min(...starts)) };
    return true;
  }
}
