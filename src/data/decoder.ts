/**
 * Token strings back to text, as the `decoder` section of tokenizer.json describes it (huggingface/tokenizers,
 * `decoders/`): ByteLevel, Metaspace, Replace, ByteFallback, Fuse, Strip, and Sequences of them.
 *
 * Every decoder is a chain of steps over a list of strings, run token by token: decoding a whole answer and streaming it are
 * the same code, so the streamed pieces always add up to the whole.
 */
import { LockstepError } from '../errors.js';
import { bytesOfByteLevelToken, decodeUtf8, decodeUtf8Strict, settledLength } from './bytes.js';

/** A running decoder. What `push` and `finish` return is final: it never changes with later tokens. */
export interface DecoderStep {
  push(token: string): string[];
  finish(): string[];
}

/** Starts a decoder for one sequence of tokens. */
export type DecoderFactory = () => DecoderStep;

type DecoderConfig = Readonly<Record<string, unknown>> & { readonly type?: string };

/** `fused`: the step's output is one string that arrives in fragments, not a list of tokens. */
interface CompiledStep {
  start: DecoderFactory;
  fused: boolean;
}

/**
 * Compiles the `decoder` section; null (no decoder) joins tokens by spaces, as the reference library does.
 * Errors: `TOKENIZER_UNSUPPORTED` for a decoder that is not in the list above.
 */
export function compileDecoder(config: unknown, where: string): DecoderFactory {
  if (config === null || config === undefined) return joinBySpaces;
  return compileStep(config as DecoderConfig, false, where).start;
}

function compileStep(config: DecoderConfig, fused: boolean, where: string): CompiledStep {
  switch (config.type) {
    case 'Sequence':
      return compileSequence(config, fused, where);
    case 'ByteLevel':
      return { start: whole(byteLevel, fused), fused: true };
    case 'ByteFallback':
      return { start: whole(byteFallback, fused), fused };
    case 'Fuse':
      return { start: () => perToken((token) => token), fused: true };
    case 'Replace':
      return { start: whole(replace(config, where), fused), fused };
    case 'Metaspace':
      return { start: whole(metaspace(config), fused), fused };
    case 'Strip': {
      const rule = stripRule(config);
      return { start: fused ? () => stripFragments(rule) : () => perToken((token) => stripToken(token, rule)), fused };
    }
    default:
      throw new LockstepError(
        'TOKENIZER_UNSUPPORTED',
        `${where}: decoder type ${JSON.stringify(config.type)} is not supported; expected one of Sequence, ByteLevel, ` +
          'ByteFallback, Fuse, Replace, Metaspace, Strip.',
        { where, type: config.type },
      );
  }
}

function compileSequence(config: DecoderConfig, fused: boolean, where: string): CompiledStep {
  const steps: DecoderFactory[] = [];
  let state = fused;
  for (const inner of (config.decoders as DecoderConfig[] | undefined) ?? []) {
    const step = compileStep(inner, state, where);
    steps.push(step.start);
    state = step.fused;
  }
  return { start: () => chain(steps.map((start) => start())), fused: state };
}

function chain(steps: readonly DecoderStep[]): DecoderStep {
  const through = (pieces: string[], from: number): string[] => {
    let current = pieces;
    for (let i = from; i < steps.length; i++) current = current.flatMap((piece) => steps[i]!.push(piece));
    return current;
  };
  return {
    push: (token) => through([token], 0),
    finish: () => steps.flatMap((step, i) => through(step.finish(), i + 1)),
  };
}

function perToken(map: (token: string) => string): DecoderStep {
  return { push: (token) => [map(token)], finish: () => [] };
}

/** A step over tokens applied to an already fused string: it waits for the end, since any fragment may cut its pattern. */
function whole(start: DecoderFactory, fused: boolean): DecoderFactory {
  if (!fused) return start;
  return () => {
    let text = '';
    return {
      push: (fragment) => {
        text += fragment;
        return [];
      },
      finish: () => {
        const step = start();
        return [...step.push(text), ...step.finish()];
      },
    };
  };
}

function joinBySpaces(): DecoderStep {
  let first = true;
  return perToken((token) => {
    const text = first ? token : ` ${token}`;
    first = false;
    return text;
  });
}

function byteLevel(): DecoderStep {
  let pending: Uint8Array = new Uint8Array(0);
  return {
    push: (token) => {
      const bytes = Buffer.concat([pending, bytesOfByteLevelToken(token)]);
      const settled = settledLength(bytes);
      pending = bytes.subarray(settled);
      return settled === 0 ? [] : [decodeUtf8(bytes.subarray(0, settled))];
    },
    finish: () => {
      const rest = pending;
      pending = new Uint8Array(0);
      return rest.length === 0 ? [] : [decodeUtf8(rest)];
    },
  };
}

/**
 * Joins runs of `<0xNN>` tokens. A run that is not valid UTF-8 as a whole becomes one U+FFFD for each of its bytes, good
 * ones included, so nothing of a run is settled before it ends.
 */
function byteFallback(): DecoderStep {
  let run: number[] = [];
  const flush = (): string[] => {
    if (run.length === 0) return [];
    const text = decodeUtf8Strict(Uint8Array.from(run)) ?? '\ufffd'.repeat(run.length);
    run = [];
    return [text];
  };
  return {
    push: (token) => {
      const byte = byteOfFallbackToken(token);
      if (byte === undefined) return [...flush(), token];
      run.push(byte);
      return [];
    },
    finish: flush,
  };
}

/** The byte of a `<0xNN>` token, else undefined. */
export function byteOfFallbackToken(token: string): number | undefined {
  return /^<0x[0-9A-Fa-f]{2}>$/.test(token) ? Number.parseInt(token.slice(3, 5), 16) : undefined;
}

function replace(config: DecoderConfig, where: string): DecoderFactory {
  const pattern = config.pattern as { String?: string; Regex?: string } | undefined;
  const content = String(config.content ?? '');
  if (typeof pattern?.String === 'string') {
    const text = pattern.String;
    return () => perToken((token) => token.replaceAll(text, () => content));
  }
  try {
    const expression = new RegExp(String(pattern?.Regex), 'gu');
    return () => perToken((token) => token.replace(expression, () => content));
  } catch (cause) {
    throw new LockstepError(
      'TOKENIZER_UNSUPPORTED',
      `${where}: decoder Replace has a pattern that JavaScript cannot read: ${JSON.stringify(pattern)}.`,
      { where, pattern },
      { cause },
    );
  }
}

/** Replacement characters become spaces; those of the first token vanish unless nothing was prepended when encoding. */
function metaspace(config: DecoderConfig): DecoderFactory {
  const replacement = String(config.replacement ?? '\u2581');
  const prepends = config.prepend_scheme !== 'never' && config.add_prefix_space !== false;
  return () => {
    let first = true;
    return perToken((token) => {
      const text = token.replaceAll(replacement, first && prepends ? '' : ' ');
      first = false;
      return text;
    });
  };
}

interface StripRule {
  content: string;
  start: number;
  stop: number;
}

function stripRule(config: DecoderConfig): StripRule {
  return { content: String(config.content ?? ' '), start: Number(config.start ?? 0), stop: Number(config.stop ?? 0) };
}

function stripToken(token: string, rule: StripRule): string {
  const step = stripFragments(rule);
  return [...step.push(token), ...step.finish()].join('');
}

/** Up to `start` leading and `stop` trailing copies of `content` go; possible trailing ones are held back. */
function stripFragments({ content, start, stop }: StripRule): DecoderStep {
  let leading = start;
  let held = '';
  return {
    push: (fragment) => {
      let text = held + fragment;
      while (leading > 0 && text.startsWith(content)) {
        text = text.slice(content.length);
        leading--;
      }
      if (text !== '') leading = 0;
      let end = text.length;
      for (let i = 0; i < stop && text.endsWith(content, end); i++) end -= content.length;
      held = text.slice(end);
      return end === 0 ? [] : [text.slice(0, end)];
    },
    finish: () => {
      held = '';
      return [];
    },
  };
}
