/**
 * Text to token ids: `@huggingface/tokenizers` normalises, pre-tokenises and merges; added tokens, template tokens and the
 * position of every token in the text are kept here.
 *
 * The library is given a repaired copy of tokenizer.json where it departs from the reference (huggingface/tokenizers):
 * - the GPT-2 split of `ByteLevel` uses JavaScript's `\s`, which has U+FEFF and lacks U+0085;
 * - `Metaspace` ignores `split` and the older `add_prefix_space`;
 * - `Split` keeps removed strings and knows no merging behaviour: they become expressions that match whole pieces;
 * - unknown tokens are fused across pieces: pieces are encoded one by one.
 */
import { Tokenizer as Library } from '@huggingface/tokenizers';
import { LockstepError } from '../errors.js';
import { type AddedToken, addedTokenSplitter, escapeRegExp } from './added-tokens.js';
import { type Aligner, type EncodedSection, tokenRange } from './alignment.js';

type Json = Record<string, unknown>;

export interface Encoder {
  /** Ids that the post-processor puts before and after a text. */
  readonly prefix: readonly number[];
  readonly suffix: readonly number[];
  /** True when encoding puts something in front of a text that is not in it (a space, as SentencePiece does). */
  readonly prependsSpace: boolean;
  /** What an added token looks like where it is matched, and so when decoded. */
  spelling(token: AddedToken): string;
  sections(text: string): EncodedSection[];
  /** First and last + 1 index of the tokens that touch characters [start, end), over all sections in order. */
  tokenRange(text: string, sections: readonly EncodedSection[], start: number, end: number): [number, number];
}

/** GPT-2's pattern (Radford et al. 2019), white space as Unicode defines it. */
const gpt2Pattern =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

/**
 * Builds the encoder of a parsed tokenizer.json.
 * @param where the directory, for messages
 * Errors: `TOKENIZER_UNSUPPORTED` for a section that cannot be followed exactly.
 */
export function createEncoder(json: Json, added: readonly AddedToken[], where: string): Encoder {
  const library = openLibrary(json, where);
  const { normalizer, pre_tokenizer: preTokenizer, model } = library;
  const lookUp = tokenIds(library, added, where);
  const normalise = (text: string): string => (normalizer ? normalizer(text) : text);
  const splitRaw = addedTokenSplitter(added.filter((token) => !token.normalized || !normalizer));
  const spelling = (token: AddedToken): string => (token.normalized ? normalise(token.content) : token.content);
  const splitNormalised = addedTokenSplitter(normalizer ? added.filter((token) => token.normalized) : [], spelling);
  const cache = new PieceCache((piece) => model!([piece]));

  const encodePlain = (text: string, first: boolean): { tokens: string[]; surface: string } => {
    const tokens: string[] = [];
    let surface = '';
    const normalised = normalise(text);
    for (const section of splitNormalised(normalised)) {
      if (section.added) {
        tokens.push(section.added.content);
        surface += section.added.content;
        continue;
      }
      const part = normalised.slice(section.start, section.end);
      const index = first && section.start === 0 ? 0 : 1;
      for (const piece of preTokenizer ? preTokenizer(part, { section_index: index }) : [part]) {
        surface += piece;
        for (const token of cache.encode(piece)) tokens.push(token);
      }
    }
    return { tokens, surface };
  };

  const sections = (text: string): EncodedSection[] =>
    splitRaw(text).map((section) => {
      if (section.added) {
        const { content, id } = section.added;
        return { ...section, tokens: [content], ids: [id], surface: content };
      }
      const plain = encodePlain(text.slice(section.start, section.end), section.start === 0);
      return { ...section, ...plain, ids: plain.tokens.map(lookUp) };
    });

  const aligner: Aligner = {
    surfaceOf: (text, first) => encodePlain(text, first).surface,
    unknown: model!.unk_token,
    wordEnd: model!.end_of_word_suffix || undefined,
    byteFallback: (json.model as Json).byte_fallback === true,
  };
  const [prefix, suffix] = templateTokens(library, lookUp);
  return {
    prefix,
    suffix,
    prependsSpace: aligner.surfaceOf('a', true) !== 'a',
    spelling,
    sections,
    tokenRange: (text, encoded, start, end) => tokenRange(aligner, text, encoded, start, end),
  };
}

/** The id of a token string; an unknown one is the unknown token. */
function tokenIds(library: Library, added: readonly AddedToken[], where: string): (token: string) => number {
  const model = library.model!;
  const known = new Map(added.map((token) => [token.content, token.id]));
  return (token) => {
    const id = known.get(token) ?? model.tokens_to_ids.get(token) ?? model.unk_token_id;
    if (id !== undefined) return id;
    const name = JSON.stringify(token);
    throw new LockstepError('TOKENIZER_INVALID', `${where}: token ${name} has no id.`, { where, token });
  };
}

function openLibrary(json: Json, where: string): Library {
  const model = (json.model ?? {}) as Json;
  const unsupported = (what: string, cause?: unknown): LockstepError =>
    new LockstepError('TOKENIZER_UNSUPPORTED', `${where}: tokenizer.json ${what}.`, { where }, { cause });
  if (model.dropout) throw unsupported(`asks for BPE dropout ${String(model.dropout)}; set it to null`);
  if (model.continuing_subword_prefix && model.type === 'BPE') throw unsupported('has a BPE continuing_subword_prefix');
  const repaired = {
    normalizer: json.normalizer ?? null,
    pre_tokenizer: repairPreTokenizer((json.pre_tokenizer ?? null) as Json | null, unsupported),
    post_processor: json.post_processor ?? null,
    // Decoding is not the library's: `compileDecoder`.
    decoder: null,
    added_tokens: json.added_tokens ?? [],
    model,
  };
  try {
    const library = new Library(repaired, { clean_up_tokenization_spaces: false });
    repairByteLevel(library.pre_tokenizer as PreTokenizerStep | null);
    return library;
  } catch (cause) {
    throw unsupported(`cannot be used: ${(cause as Error).message}`, cause);
  }
}

/** The parts of a library pre-tokenizer that matter here: the pattern of a ByteLevel step, the steps of a Sequence. */
interface PreTokenizerStep {
  byte_encoder?: unknown;
  pattern?: RegExp;
  tokenizers?: readonly PreTokenizerStep[];
}

/** Gives every `ByteLevel` step of a pre-tokenizer the pattern above. */
function repairByteLevel(step: PreTokenizerStep | null): void {
  if (step?.byte_encoder) step.pattern = gpt2Pattern;
  for (const inner of step?.tokenizers ?? []) repairByteLevel(inner);
}

type Unsupported = (what: string) => LockstepError;

function repairPreTokenizer(config: Json | null, unsupported: Unsupported): Json | null {
  switch (config?.type) {
    case 'Sequence':
      return {
        ...config,
        pretokenizers: (config.pretokenizers as Json[]).map((inner) => repairPreTokenizer(inner, unsupported)),
      };
    case 'Metaspace':
      return repairMetaspace(config);
    case 'Split':
      return repairSplit(config, unsupported);
    default:
      return config;
  }
}

function repairMetaspace(config: Json): Json {
  const mark = String(config.replacement ?? '\u2581');
  const spaces = {
    ...config,
    replacement: mark,
    ...(config.add_prefix_space === false && { prepend_scheme: 'never' }),
  };
  if (config.split === false) return spaces;
  const regex = piecesExpression(escapeRegExp(mark), 'MergedWithNext');
  return {
    type: 'Sequence',
    pretokenizers: [spaces, { type: 'Split', pattern: { Regex: regex }, behavior: 'Isolated', invert: false }],
  };
}

function repairSplit(config: Json, unsupported: Unsupported): Json {
  const behavior = String(config.behavior ?? 'Isolated');
  if (behavior === 'Isolated') return { ...config, invert: false };
  const { String: text, Regex: regex } = (config.pattern ?? {}) as { String?: string; Regex?: string };
  const source = text === undefined ? regex : escapeRegExp(text);
  // `invert` keeps what matches: the pattern itself, or the pieces between its matches.
  if (behavior === 'Removed' && config.invert === true) return config;
  const expression = source === undefined ? undefined : piecesExpression(source, behavior);
  if (expression === undefined || config.invert === true) {
    throw unsupported(`has a Split pre-tokenizer with behavior ${behavior}, invert ${String(config.invert)}`);
  }
  return { ...config, pattern: { Regex: expression }, behavior: 'Removed', invert: true };
}

/** An expression whose matches are the pieces into which `pattern` splits under a behaviour. */
function piecesExpression(pattern: string, behavior: string): string | undefined {
  const other = `(?:(?!${pattern})[\\s\\S])`;
  switch (behavior) {
    case 'Removed':
      return `${other}+`;
    case 'MergedWithPrevious':
      return `${other}*(?:${pattern})|${other}+`;
    case 'MergedWithNext':
      return `(?:${pattern})${other}*|${other}+`;
    case 'Contiguous':
      return `(?:${pattern})+|${other}+`;
    default:
      return undefined;
  }
}

/** What the post-processor puts around a text, found by wrapping a mark. */
function templateTokens(library: Library, lookUp: (token: string) => number): [number[], number[]] {
  const mark = '\u0000text';
  const around = library.post_processor?.post_process([mark], null, true).tokens ?? [mark];
  const at = around.indexOf(mark);
  return [around.slice(0, at).map(lookUp), around.slice(at + 1).map(lookUp)];
}

/** Tokens of recently seen pieces; text repeats its words. */
class PieceCache {
  private readonly known = new Map<string, string[]>();

  constructor(private readonly compute: (piece: string) => string[]) {}

  encode(piece: string): string[] {
    if (piece.length > 64) return this.compute(piece);
    let tokens = this.known.get(piece);
    if (tokens === undefined) {
      tokens = this.compute(piece);
      if (this.known.size >= 20_000) this.known.clear();
      this.known.set(piece, tokens);
    }
    return tokens;
  }
}
