/**
 * What a row of data is: `{tokens[, mask]}`, `{text}`, `{prompt[, response]}`, `{messages}` or
 * `{chosen, rejected[, prompt][, margin]}`. A row with the columns of several kinds is the first of tokens, chosen and
 * rejected, messages, prompt, text; null columns count as absent.
 */
import { LockstepError } from '../errors.js';
import type { Message } from './chat-template.js';
import type { Columns } from './jsonl.js';

/** Words in one of their forms: text, a chat, or token ids. */
export type Content = string | readonly Message[] | Int32Array;

/** Where a row stands. */
export interface RowPlace {
  file: string;
  /** Line of a JSONL file or row of a Parquet file, from 1. */
  line: number;
}

interface RowBase {
  /** Every column as the file gives it; a reward function sees these. */
  readonly columns: Columns;
  readonly place: RowPlace;
}

export interface TokensRow extends RowBase {
  readonly kind: 'tokens';
  readonly tokens: Int32Array;
  /** 1: learned. As long as `tokens`. */
  readonly mask?: Uint8Array;
}

export interface TextRow extends RowBase {
  readonly kind: 'text';
  readonly text: string;
}

export interface PromptRow extends RowBase {
  readonly kind: 'prompt';
  readonly prompt: Content;
  readonly response?: Content;
}

export interface MessagesRow extends RowBase {
  readonly kind: 'messages';
  readonly messages: readonly Message[];
}

/** With a prompt, `chosen` and `rejected` answer it; a chat answers with its messages. */
export interface PairRow extends RowBase {
  readonly kind: 'pair';
  readonly prompt: Content;
  readonly chosen: Content;
  readonly rejected: Content;
  /** By how much the chosen answer is better; 0 when the row does not say. */
  readonly margin: number;
}

export type Row = TokensRow | TextRow | PromptRow | MessagesRow | PairRow;

/** `file, line 7`, for messages. */
export function placeText(place: RowPlace): string {
  return `${place.file}, ${place.file.endsWith('.parquet') ? 'row' : 'line'} ${place.line}`;
}

/** The error for a row that cannot be used. */
export function badRow(place: RowPlace, reason: string): LockstepError {
  return new LockstepError('DATA_BAD_ROW', `${placeText(place)}: ${reason}`, { ...place, reason });
}

/** Recognises a row by its columns. Errors: `DATA_BAD_ROW` with file, line and reason. */
export function parseRow(columns: Columns, place: RowPlace): Row {
  const reader = new ColumnReader(columns, place);
  const base = { columns, place };
  if (reader.has('tokens')) return { ...base, kind: 'tokens', ...tokensAndMask(reader) };
  if (reader.has('chosen') || reader.has('rejected')) return { ...base, kind: 'pair', ...pair(reader) };
  if (reader.has('messages')) return { ...base, kind: 'messages', messages: reader.messages('messages') };
  if (reader.has('prompt')) {
    const prompt = reader.content('prompt');
    if (!reader.has('response')) return { ...base, kind: 'prompt', prompt };
    const response = reader.content('response');
    reader.expectAnswer('response', response, prompt);
    return { ...base, kind: 'prompt', prompt, response };
  }
  if (reader.has('text')) return { ...base, kind: 'text', text: reader.text('text') };
  const found = Object.keys(columns).join(', ') || 'none';
  throw badRow(
    place,
    `expected the columns of a row: tokens, text, prompt[, response], messages, or chosen and rejected; received ${found}`,
  );
}

function tokensAndMask(reader: ColumnReader): { tokens: Int32Array; mask?: Uint8Array } {
  const tokens = reader.tokens('tokens');
  if (tokens.length === 0) throw reader.fault('tokens', 'at least one token id', []);
  if (!reader.has('mask')) return { tokens };
  const values = reader.array('mask');
  if (values.length !== tokens.length) {
    throw badRow(reader.place, `mask has ${values.length} entries for ${tokens.length} tokens; expected one for each`);
  }
  const mask = Uint8Array.from(values, (value, i) => {
    if (value === 1 || value === true) return 1;
    if (value === 0 || value === false) return 0;
    throw reader.fault(`mask[${i}]`, '0 or 1', value);
  });
  return { tokens, mask };
}

function pair(reader: ColumnReader): { prompt: Content; chosen: Content; rejected: Content; margin: number } {
  for (const column of ['chosen', 'rejected']) {
    if (!reader.has(column)) throw badRow(reader.place, `${column} is missing; expected both chosen and rejected`);
  }
  const chosen = reader.content('chosen');
  const rejected = reader.content('rejected');
  const margin = reader.has('margin') ? reader.number('margin') : 0;
  if (reader.has('prompt')) {
    const prompt = reader.content('prompt');
    reader.expectAnswer('chosen', chosen, prompt);
    reader.expectAnswer('rejected', rejected, prompt);
    return { prompt, chosen, rejected, margin };
  }
  if (formOf(chosen) !== formOf(rejected)) {
    throw badRow(
      reader.place,
      `chosen is ${formOf(chosen)} and rejected is ${formOf(rejected)}; expected the same form`,
    );
  }
  const shared =
    typeof chosen === 'string'
      ? sharedDialogue(chosen, rejected as string)
      : sharedCount(chosen, rejected as typeof chosen);
  for (const [side, answer] of Object.entries({ chosen, rejected })) {
    if (formOf(answer) !== 'messages' || answer.length > shared) continue;
    throw badRow(reader.place, `${side} has no message beyond those it shares; expected an answer`);
  }
  return {
    prompt: chosen.slice(0, shared),
    chosen: chosen.slice(shared),
    rejected: (rejected as typeof chosen).slice(shared),
    margin,
  };
}

const assistantTurn = '\n\nAssistant:';

/** Characters up to and with the last `\n\nAssistant:` that both dialogues share; 0 when they share none. */
function sharedDialogue(a: string, b: string): number {
  const limit = Math.min(a.length, b.length);
  let common = 0;
  while (common < limit && a[common] === b[common]) common++;
  const at = common < assistantTurn.length ? -1 : a.lastIndexOf(assistantTurn, common - assistantTurn.length);
  return at < 0 ? 0 : at + assistantTurn.length;
}

/** Leading tokens, or messages before the answers, that both share. */
function sharedCount(a: readonly Message[] | Int32Array, b: readonly Message[] | Int32Array): number {
  const limit = Math.min(a.length, b.length);
  let common = 0;
  while (common < limit && JSON.stringify(a[common]) === JSON.stringify(b[common])) common++;
  if (a instanceof Int32Array) return common;
  // Equal dialogues share everything; the answer is then their last assistant message.
  if (common === a.length && common === b.length && common > 0) return common - 1;
  return common;
}

function formOf(content: Content): string {
  return typeof content === 'string' ? 'text' : content instanceof Int32Array ? 'tokens' : 'messages';
}

/** Typed access to the columns of a row; every fault names the row, the column, what was expected and what was there. */
class ColumnReader {
  constructor(
    private readonly columns: Columns,
    readonly place: RowPlace,
  ) {}

  has(column: string): boolean {
    return this.columns[column] !== undefined && this.columns[column] !== null;
  }

  fault(column: string, expected: string, received: unknown): LockstepError {
    const shown = received === undefined ? 'nothing' : (JSON.stringify(received) ?? String(received));
    const short = shown.length > 60 ? `${shown.slice(0, 60)}...` : shown;
    return badRow(this.place, `${column}: expected ${expected}, received ${short}`);
  }

  text(column: string): string {
    const value = this.columns[column];
    if (typeof value === 'string') return value;
    throw this.fault(column, 'a string', value);
  }

  number(column: string): number {
    const value = this.columns[column];
    if (typeof value === 'number' && Number.isFinite(value)) return value;
    throw this.fault(column, 'a finite number', value);
  }

  array(column: string): readonly unknown[] {
    const value = this.columns[column];
    if (Array.isArray(value)) return value;
    if (ArrayBuffer.isView(value) && !(value instanceof DataView)) return Array.from(value as unknown as number[]);
    throw this.fault(column, 'an array', value);
  }

  tokens(column: string): Int32Array {
    return Int32Array.from(this.array(column), (value, i) => {
      if (typeof value === 'number' && Number.isInteger(value) && value >= 0 && value < 2 ** 31) return value;
      throw this.fault(`${column}[${i}]`, 'a token id (an integer from 0)', value);
    });
  }

  messages(column: string): readonly Message[] {
    const list = this.array(column);
    if (list.length === 0) throw this.fault(column, 'at least one message', list);
    return list.map((value, i) => {
      const message = (typeof value === 'object' && value !== null ? value : {}) as Record<string, unknown>;
      if (typeof message.role !== 'string') {
        throw this.fault(`${column}[${i}]`, 'a message with a "role" and a "content"', value);
      }
      const { content } = message;
      const spoken = typeof content === 'string' || Array.isArray(content) || 'tool_calls' in message;
      if (!spoken) throw this.fault(`${column}[${i}].content`, 'a string', content);
      return message as unknown as Message;
    });
  }

  content(column: string): Content {
    const value = this.columns[column];
    if (typeof value === 'string') return value;
    const list = this.array(column);
    return typeof list[0] === 'object' ? this.messages(column) : this.tokens(column);
  }

  /** An answer has the form of its prompt; text also answers a chat, and tokens answer anything but a chat. */
  expectAnswer(column: string, answer: Content, prompt: Content): void {
    const [from, to] = [formOf(prompt), formOf(answer)];
    if (from === to || (from === 'messages' && to === 'text') || (from !== 'messages' && to !== 'messages')) return;
    throw badRow(this.place, `${column} is ${to} and prompt is ${from}; expected the same form`);
  }
}
