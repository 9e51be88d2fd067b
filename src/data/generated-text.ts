/**
 * Text of what a model has generated. A model's vocabulary is often larger than its tokenizer's, and an untrained model samples
 * ids that stand for nothing: they show as U+FFFD, where `Tokenizer.decode` would refuse them.
 */
import type { DecodeOptions, Tokenizer, TokenStream } from './tokenizer.js';

const unknown = '\uFFFD';

/** Like `tokenizer.stream`, for generated tokens. */
export function generatedStream(tokenizer: Tokenizer, options: DecodeOptions = {}): TokenStream {
  let stream = tokenizer.stream(options);
  return {
    push: (id) => {
      if (tokenizer.has(id)) return stream.push(id);
      const before = stream.finish();
      stream = tokenizer.stream(options);
      return before + unknown;
    },
    finish: () => stream.finish(),
  };
}

/** Like `tokenizer.decode`, for generated tokens. */
export function generatedText(tokenizer: Tokenizer, ids: Iterable<number>, options: DecodeOptions = {}): string {
  const stream = generatedStream(tokenizer, options);
  let text = '';
  for (const id of ids) text += stream.push(id);
  return text + stream.finish();
}

/** How many of the ids stand for nothing. */
export function countUnknown(tokenizer: Tokenizer, ids: Iterable<number>): number {
  let count = 0;
  for (const id of ids) if (!tokenizer.has(id)) count++;
  return count;
}
