/** JSON Lines: one object a line, lines of any length, LF or CRLF, blank lines passed over, a byte order mark allowed. */

import { constants as bufferLimits } from 'node:buffer';
import { createReadStream } from 'node:fs';
import { decodeUtf8Strict } from './bytes.js';

/** A line that is not blank. */
export interface RawLine {
  /** From 1. */
  line: number;
  /** Bytes [start, end) of the file, without the line's end. */
  start: number;
  end: number;
  bytes: Buffer;
}

/** Columns of one row, as its file gives them. */
export type Columns = Readonly<Record<string, unknown>>;

const newline = 0x0a;

/** Lines of a file as they are read; only the current line is in memory. */
export async function* scanLines(path: string): AsyncGenerator<RawLine> {
  let parts: Buffer[] = [];
  let line = 1;
  let start = 0;
  let position = 0;
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20 }) as AsyncIterable<Buffer>) {
    let from = 0;
    for (let at = chunk.indexOf(newline); at >= 0; at = chunk.indexOf(newline, from)) {
      parts.push(chunk.subarray(from, at));
      const raw = trimmedLine(parts, line, start);
      if (raw) yield raw;
      parts = [];
      from = at + 1;
      start = position + from;
      line++;
    }
    if (from < chunk.length) parts.push(chunk.subarray(from));
    position += chunk.length;
  }
  const raw = trimmedLine(parts, line, start);
  if (raw) yield raw;
}

function trimmedLine(parts: readonly Buffer[], line: number, start: number): RawLine | undefined {
  let bytes = parts.length === 1 ? parts[0]! : Buffer.concat(parts);
  let first = start;
  if (start === 0 && bytes[0] === 0xef && bytes[1] === 0xbb && bytes[2] === 0xbf) {
    bytes = bytes.subarray(3);
    first = 3;
  }
  if (bytes.at(-1) === 0x0d) bytes = bytes.subarray(0, -1);
  const blank = bytes.every((byte) => byte === 0x20 || byte === 0x09 || byte === 0x0d);
  return blank ? undefined : { line, start: first, end: first + bytes.length, bytes };
}

/** Parses a line. Throws an Error whose message is the reason. */
export function parseLine(bytes: Buffer): Columns {
  if (bytes.length > bufferLimits.MAX_STRING_LENGTH) {
    throw new Error(`the line has ${bytes.length} bytes, more than JavaScript can hold in one string`);
  }
  const text = decodeUtf8Strict(bytes);
  if (text === undefined) throw new Error('the line is not valid UTF-8');
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`not JSON: ${(error as Error).message}`);
  }
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Columns;
  const received = value === null ? 'null' : Array.isArray(value) ? 'an array' : `a ${typeof value}`;
  throw new Error(`expected a JSON object, received ${received}`);
}
