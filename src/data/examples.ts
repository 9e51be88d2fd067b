/**
 * Rows as tokens. Strings are tokenised as they stand, with the tokenizer's own begin token; only messages pass the chat template.
 * Prompt and answer are tokenised apart, since a rollout's answer begins after the prompt's last token.
 */
import { LockstepError } from '../errors.js';
import type { Message } from './chat-template.js';
import { badRow, type Content, placeText, type Row, type RowPlace } from './rows.js';
import type { MaskedTokens, Tokenizer } from './tokenizer.js';

/** Two answers to one prompt. */
export interface TokenPair {
  /** Prompt and answer. */
  chosen: Int32Array;
  rejected: Int32Array;
  /** Which tokens are the answers', as in `toTrainingExample`. */
  chosenMask: Uint8Array;
  rejectedMask: Uint8Array;
  margin: number;
}

export interface PromptTokens {
  tokens: Int32Array;
  row: Row;
}

export interface ExampleOptions {
  /** The model's directory, named when a tokenizer is missing. */
  directory?: string;
}

export interface PairOptions extends ExampleOptions {
  /** Appends the end token to answers given as text. Default false: as they stand. */
  endToken?: boolean;
}

/**
 * A row to learn from. Learned are assistant turns, the response with the end token behind it, all of a text with its end token, and
 * the tokens that a mask marks (all without one). `mask[i]` says that token i is learned as a prediction from those before it, so
 * `mask[0]` is always 0.
 * Errors: `DATA_BAD_ROW` for a row of another kind, `TOKENIZER_MISSING`, `END_TOKEN_MISSING`, those of the template.
 */
export function toTrainingExample(
  row: Row,
  tokenizer: Tokenizer | undefined,
  options: ExampleOptions = {},
): MaskedTokens {
  const example = trainingExample(row, tokenizer, options);
  example.mask[0] = 0;
  return example;
}

function trainingExample(row: Row, tokenizer: Tokenizer | undefined, options: ExampleOptions): MaskedTokens {
  switch (row.kind) {
    case 'tokens':
      return { tokens: row.tokens, mask: row.mask?.slice() ?? new Uint8Array(row.tokens.length).fill(1) };
    case 'text': {
      const known = need(tokenizer, row.place, options);
      const tokens = ended(known.encodePrompt(row.text), known, row.place);
      return { tokens, mask: new Uint8Array(tokens.length).fill(1) };
    }
    case 'messages':
      return chatAnswer([], row.messages, need(tokenizer, row.place, options), row.place);
    case 'prompt':
      if (row.response === undefined) throw badRow(row.place, 'the row has a prompt but no response to learn');
      return answered(row.prompt, row.response, tokenizer, row.place, { ...options, endToken: true });
    case 'pair':
      throw badRow(
        row.place,
        'chosen and rejected answers cannot be learned from directly; expected a response or messages',
      );
  }
}

/** Errors: `DATA_BAD_ROW` for a row of another kind, and those of `toTrainingExample`. */
export function toPair(row: Row, tokenizer: Tokenizer | undefined, options: PairOptions = {}): TokenPair {
  if (row.kind !== 'pair') {
    throw badRow(row.place, `expected chosen and rejected answers, received a row of ${row.kind}`);
  }
  const chosen = answered(row.prompt, row.chosen, tokenizer, row.place, options);
  const rejected = answered(row.prompt, row.rejected, tokenizer, row.place, options);
  for (const [side, { tokens, mask }] of Object.entries({ chosen, rejected })) {
    if (tokens.length === 0) throw badRow(row.place, `${side} has no tokens, prompt included; expected at least one`);
    mask[0] = 0;
  }
  return {
    chosen: chosen.tokens,
    rejected: rejected.tokens,
    chosenMask: chosen.mask,
    rejectedMask: rejected.mask,
    margin: row.margin,
  };
}

/**
 * The tokens that a rollout of this row starts from; an answer that the row has is left out: a response, or assistant turns at the end of
 * messages. Errors: as `toTrainingExample`.
 */
export function toPrompt(row: Row, tokenizer: Tokenizer | undefined, options: ExampleOptions = {}): PromptTokens {
  const tokens = row.kind === 'tokens' ? row.tokens : promptTokens(promptOf(row), tokenizer, row.place, options);
  if (tokens.length === 0) throw badRow(row.place, 'the prompt has no tokens; expected at least one');
  return { tokens, row };
}

function promptOf(row: Exclude<Row, { kind: 'tokens' }>): Content {
  switch (row.kind) {
    case 'text':
      return row.text;
    case 'messages':
      return asked(row);
    default:
      return row.prompt;
  }
}

/** Messages up to the last that is not the assistant's. */
function asked({ messages, place }: Extract<Row, { kind: 'messages' }>): readonly Message[] {
  const end = messages.findLastIndex(({ role }) => role !== 'assistant') + 1;
  if (end === 0) throw badRow(place, 'the messages are all of the assistant; expected one to answer');
  return messages.slice(0, end);
}

function promptTokens(
  prompt: Content,
  tokenizer: Tokenizer | undefined,
  place: RowPlace,
  options: ExampleOptions,
): Int32Array {
  if (prompt instanceof Int32Array) return prompt;
  const known = need(tokenizer, place, options);
  if (typeof prompt === 'string') return known.encodePrompt(prompt);
  return atPlace(place, () => known.encodeChat(prompt, { addGenerationPrompt: true }));
}

/** Prompt and answer as tokens, the answer marked. */
function answered(
  prompt: Content,
  answer: Content,
  tokenizer: Tokenizer | undefined,
  place: RowPlace,
  options: PairOptions,
): MaskedTokens {
  const chat = chatOf(prompt, answer);
  if (chat) return chatAnswer(chat.before, chat.turns, need(tokenizer, place, options), place);
  const head = promptTokens(prompt, tokenizer, place, options);
  let tail: Int32Array;
  if (answer instanceof Int32Array) {
    tail = answer;
  } else {
    const known = need(tokenizer, place, options);
    const before = typeof prompt === 'string' ? prompt : '';
    tail = known.encodeContinuation(before, answer as string);
    if (options.endToken) tail = ended(tail, known, place);
  }
  const tokens = joined(head, tail);
  return { tokens, mask: new Uint8Array(tokens.length).fill(1, head.length) };
}

/** The messages before an answer and the answer's own, when either is a chat. */
function chatOf(
  prompt: Content,
  answer: Content,
): { before: readonly Message[]; turns: readonly Message[] } | undefined {
  if (isChat(answer)) return { before: isChat(prompt) ? prompt : [], turns: answer };
  if (!isChat(prompt)) return undefined;
  return { before: prompt, turns: [{ role: 'assistant', content: answer }] };
}

/** The rendered chat, the assistant's words in `turns` marked. */
function chatAnswer(
  before: readonly Message[],
  turns: readonly Message[],
  tokenizer: Tokenizer,
  place: RowPlace,
): MaskedTokens {
  return atPlace(place, () => tokenizer.assistantMask([...before, ...turns], { from: before.length }));
}

function joined(head: ArrayLike<number>, tail: ArrayLike<number>): Int32Array {
  const tokens = new Int32Array(head.length + tail.length);
  tokens.set(head);
  tokens.set(tail, head.length);
  return tokens;
}

function isChat(content: Content): content is readonly Message[] {
  return typeof content !== 'string' && !(content instanceof Int32Array);
}

/** The tokens with the end token behind them, unless they end with it already. */
function ended(tokens: Int32Array, tokenizer: Tokenizer, place: RowPlace): Int32Array {
  const { endToken } = tokenizer;
  if (endToken === undefined) {
    throw new LockstepError(
      'END_TOKEN_MISSING',
      `${placeText(place)}: an end token belongs behind this row, and the tokenizer of ${tokenizer.directory} names none; set ` +
        'eos_token in tokenizer_config.json to one of its tokens.',
      { directory: tokenizer.directory },
    );
  }
  return tokens.at(-1) === endToken ? tokens : joined(tokens, [endToken]);
}

function need(tokenizer: Tokenizer | undefined, place: RowPlace, { directory }: ExampleOptions): Tokenizer {
  if (tokenizer) return tokenizer;
  throw new LockstepError(
    'TOKENIZER_MISSING',
    `${placeText(place)}: this row is text, and ${directory ?? 'the model directory'} has no tokenizer.json; add the model's ` +
      'tokenizer files, or give the data as token ids.',
    { directory, ...place },
  );
}

/** Errors of the template, with the row's place in front. */
function atPlace<T>(place: RowPlace, work: () => T): T {
  try {
    return work();
  } catch (error) {
    if (!LockstepError.isInstance(error)) throw error;
    throw new LockstepError(
      error.code,
      `${placeText(place)}: ${error.message}`,
      { ...error.details, ...place },
      { cause: error },
    );
  }
}

/**
 * Refuses token ids that a model does not have.
 * @param where the row's place, or what else the tokens belong to
 * Errors: `TOKEN_OUT_OF_RANGE` with the id, its position and the vocabulary.
 */
export function checkTokens(tokens: Int32Array, vocabularySize: number, where: RowPlace | string): void {
  const position = tokens.findIndex((id) => id < 0 || id >= vocabularySize);
  if (position < 0) return;
  const id = tokens[position]!;
  const place = typeof where === 'string' ? where : placeText(where);
  throw new LockstepError(
    'TOKEN_OUT_OF_RANGE',
    `${place}: token ${id} at position ${position} is outside the model's vocabulary of ${vocabularySize} (ids 0 to ` +
      `${vocabularySize - 1}); use data or a tokenizer made for this model.`,
    { id, position, vocabularySize, where: place },
  );
}
