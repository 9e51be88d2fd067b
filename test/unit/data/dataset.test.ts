import { rm, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { fileWriter, ParquetWriter, parquetWriteFile } from 'hyparquet-writer';
import { describe, expect, test } from 'vitest';
import { openDataset, readRows } from '../../../src/data/dataset.js';
import { shuffledRows } from '../../../src/data/sampler.js';
import { jsonlFile, temporaryDirectory } from './tokenizers.js';

async function file(content: string | Buffer, name = 'data.jsonl'): Promise<string> {
  const path = join(await temporaryDirectory(), name);
  await writeFile(path, content);
  return path;
}

async function texts(path: string): Promise<[number, unknown][]> {
  await using data = await openDataset(path);
  const rows: [number, unknown][] = [];
  for (let i = data.length - 1; i >= 0; i--) {
    const row = await data.row(i);
    rows.unshift([row.place.line, row.columns.text]);
  }
  return rows;
}

describe('JSON lines', () => {
  test('line ends, a byte order mark, blank lines and a missing last newline do not matter', async () => {
    const path = await file('\ufeff{"text":"a"}\r\n\n \t\r\n{"text":"b\u00e9"}\n{"text":"c"}');
    expect(await texts(path)).toEqual([
      [1, 'a'],
      [4, 'bé'],
      [5, 'c'],
    ]);
  });

  test('a bad line is an error with file, line and reason', async () => {
    const cases: [string | Buffer, RegExp][] = [
      ['{"text":"a"}\n\n{"text":\n', /data\.jsonl, line 3: not JSON: /],
      ['[1]\n', /line 1: expected a JSON object, received an array/],
      [Buffer.from([0x7b, 0xff, 0x7d, 0x0a]), /line 1: the line is not valid UTF-8/],
      ['{"question":"a"}\n', /line 1: expected the columns of a row.*received question/],
    ];
    for (const [content, message] of cases) {
      await expect(openDataset(await file(content))).rejects.toMatchObject({
        code: 'DATA_BAD_ROW',
        message: expect.stringMatching(message),
      });
    }
  });

  test('skip leaves bad lines out, counts them and keeps their reasons', async () => {
    const path = await file('{"text":"a"}\nnonsense\n{"text":"b"}\n{}\n');
    await using data = await openDataset(path, { onError: 'skip' });
    expect(data.length).toBe(2);
    expect((await data.row(1)).place.line).toBe(3);
    expect(data.skipped.count).toBe(2);
    expect(data.skipped.errors.map((error) => error.details.line)).toEqual([2, 4]);
    const skipped = { count: 0, errors: [] };
    const lines: number[] = [];
    for await (const row of readRows(path, { onError: 'skip' }, skipped)) lines.push(row.place.line);
    expect([lines, skipped.count]).toEqual([[1, 3], 2]);
  });

  test('a line of ten megabytes is a row like any other', async () => {
    const long = 'x'.repeat(10 * 2 ** 20);
    const path = await jsonlFile([{ text: 'a' }, { text: long }, { text: 'b' }]);
    const rows = await texts(path);
    expect(rows.map(([line]) => line)).toEqual([1, 2, 3]);
    expect(rows[1]![1] === long).toBe(true);
    expect(rows[2]![1]).toBe('b');
  });

  test('a file that has changed since it was opened is noticed', async () => {
    const path = await jsonlFile([{ text: 'a' }, { text: 'b' }]);
    await using data = await openDataset(path);
    await writeFile(path, 'x'.repeat(100));
    await expect(data.row(1)).rejects.toMatchObject({ code: 'DATA_UNREADABLE' });
  });
});

describe('files that give no rows', () => {
  test('a missing file, an empty one, a directory and a broken Parquet file are told apart', async () => {
    const directory = await temporaryDirectory();
    const missing = join(directory, 'none.jsonl');
    await expect(openDataset(missing)).rejects.toMatchObject({
      code: 'DATA_FILE_MISSING',
      message: expect.stringContaining(missing),
    });
    await expect(openDataset(await file('\n\n'))).rejects.toMatchObject({ code: 'DATA_EMPTY' });
    await expect(openDataset(await file('x\n'), { onError: 'skip' })).rejects.toMatchObject({
      code: 'DATA_EMPTY',
      message: expect.stringContaining('all 1 were bad'),
    });
    await expect(openDataset(directory)).rejects.toMatchObject({ code: 'DATA_UNREADABLE' });
    await expect(openDataset(await file('PAR1 and nothing else', 'a.parquet'))).rejects.toMatchObject({
      code: 'DATA_UNREADABLE',
    });
    await expect(readRows(missing).next()).rejects.toMatchObject({ code: 'DATA_FILE_MISSING' });
  });
});

describe('Parquet', () => {
  const messages = (i: number) => [
    { role: 'user', content: `q${i}` },
    { role: 'assistant', content: `a${i}` },
  ];

  test('rows come back as they were written, over row groups, messages and integers included', async () => {
    const filename = join(await temporaryDirectory(), 'data.parquet');
    const count = 25;
    const range = Array.from({ length: count }, (_, i) => i);
    parquetWriteFile({
      filename,
      columnData: [
        { name: 'messages', data: range.map(messages) },
        { name: 'answer', data: range.map((i) => BigInt(i)) },
        { name: 'note', data: range.map((i) => (i % 2 ? `n${i}` : null)) },
      ],
      schema: [
        { name: 'root', num_children: 3 },
        { name: 'messages', repetition_type: 'OPTIONAL', num_children: 1, converted_type: 'LIST' },
        { name: 'list', repetition_type: 'REPEATED', num_children: 1 },
        { name: 'element', repetition_type: 'OPTIONAL', num_children: 2 },
        { name: 'role', type: 'BYTE_ARRAY', converted_type: 'UTF8', repetition_type: 'OPTIONAL' },
        { name: 'content', type: 'BYTE_ARRAY', converted_type: 'UTF8', repetition_type: 'OPTIONAL' },
        { name: 'answer', type: 'INT64', repetition_type: 'REQUIRED' },
        { name: 'note', type: 'BYTE_ARRAY', converted_type: 'UTF8', repetition_type: 'OPTIONAL' },
      ],
      rowGroupSize: 10,
    });
    await using data = await openDataset(filename);
    expect(data.length).toBe(count);
    for (const i of [24, 0, 13, 9, 10]) {
      const row = await data.row(i);
      expect(row).toMatchObject({ kind: 'messages', messages: messages(i), place: { line: i + 1 } });
      expect([row.columns.answer, row.columns.note ?? null]).toEqual([i, i % 2 ? `n${i}` : null]);
    }
  });

  test('rows of files larger than memory are read once, and then in any order', async () => {
    const path = join(await temporaryDirectory(), 'data.parquet');
    const writer = new ParquetWriter({
      writer: fileWriter(path),
      schema: [
        { name: 'root', num_children: 2 },
        { name: 'text', type: 'BYTE_ARRAY', converted_type: 'UTF8', repetition_type: 'REQUIRED' },
        { name: 'large', type: 'INT64', repetition_type: 'REQUIRED' },
      ],
    });
    const range = Array.from({ length: 25 }, (_, i) => i);
    const large = (i: number) => 2n ** 60n + BigInt(i);
    writer.write({
      columnData: [
        { name: 'text', data: range.map((i) => `line ${i}`) },
        { name: 'large', data: range.map(large) },
      ],
      rowGroupSize: 5,
    });
    for (const group of writer.row_groups) group.total_byte_size = 2n ** 40n;
    writer.finish();
    await using data = await openDataset(path);
    await rm(path);
    for (const i of shuffledRows(25, 1, 0)) {
      const { columns, place } = await data.row(i);
      expect(columns).toEqual({ text: `line ${i}`, large: large(i) });
      expect(place.line).toBe(i + 1);
    }
  });

  test('gives the rows of the same JSON lines, in the same order', async () => {
    const range = Array.from({ length: 25 }, (_, i) => i);
    const filename = join(await temporaryDirectory(), 'data.parquet');
    const columnData = [{ name: 'text', data: range.map((i) => `line ${i}`), type: 'STRING' as const }];
    parquetWriteFile({ filename, columnData, rowGroupSize: 10 });
    const lines = await file(range.map((i) => `${JSON.stringify({ text: `line ${i}` })}\n`).join(''));
    expect(await texts(filename)).toEqual(await texts(lines));
  });

  test('gzip pages are read, token columns are tokens, and a bad row has its number', async () => {
    const directory = await temporaryDirectory();
    const filename = join(directory, 'data.parquet');
    parquetWriteFile({
      filename,
      columnData: [{ name: 'prompt', data: ['a', 'b', null], type: 'STRING' }],
      codec: 'GZIP',
      compressors: { GZIP: (bytes) => new Uint8Array(gzipSync(bytes)) },
    });
    await expect(openDataset(filename)).rejects.toMatchObject({
      code: 'DATA_BAD_ROW',
      message: expect.stringContaining('data.parquet, row 3: expected the columns'),
    });
    await using data = await openDataset(filename, { onError: 'skip' });
    expect([data.length, data.skipped.count]).toEqual([2, 1]);
    expect(await data.row(1)).toMatchObject({ kind: 'prompt', prompt: 'b' });
  });
});
