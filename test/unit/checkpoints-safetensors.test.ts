import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { readSafetensorsHeader, safetensorsHeader, writeSafetensors } from '../../src/checkpoints/safetensors.js';
import { type Json, rawSafetensors, temporaryDirectory } from './checkpoints-files.js';
import { readFloat32 } from './fake-files.js';

const entry = (shape: number[], begin: number, end: number, dtype = 'F32'): Json => ({
  dtype,
  shape,
  data_offsets: [begin, end],
});

function fileWith(bytes: Uint8Array): string {
  const file = join(temporaryDirectory(), 'model.safetensors');
  writeFileSync(file, bytes);
  return file;
}

describe('a valid header', () => {
  test('gives dtype, shape and absolute offsets, in the order of the bytes', async () => {
    const header = {
      __metadata__: { format: 'pt' },
      b: entry([3], 8, 14, 'BF16'),
      a: entry([2, 1], 0, 8),
      empty: entry([0, 5], 14, 14),
      scalar: entry([], 14, 18),
    };
    const bytes = rawSafetensors(header, 18);
    const file = fileWith(bytes);
    const tensors = await readSafetensorsHeader(file);
    const begin = bytes.length - 18;
    expect([...tensors.keys()]).toEqual(['a', 'b', 'empty', 'scalar']);
    expect(tensors.get('b')).toEqual({ file, dtype: 'BF16', shape: [3], offset: begin + 8, bytes: 6 });
    expect(tensors.get('scalar')).toMatchObject({ shape: [], bytes: 4 });
  });

  test('keys that repeat inside entries or look like keys inside strings are no duplicates', async () => {
    const header = { __metadata__: { a: '"a": {"dtype"' }, a: entry([1], 0, 4), 'x"a': entry([1], 4, 8) };
    expect((await readSafetensorsHeader(fileWith(rawSafetensors(header, 8)))).size).toBe(2);
  });
});

describe('a file that lies is CHECKPOINT_CORRUPT, named with its tensor', () => {
  const a = entry([2], 0, 8);
  test.each<[string, Uint8Array, RegExp]>([
    ['an empty file', Buffer.alloc(0), /0 bytes, too few/],
    ['seven bytes', Buffer.alloc(7), /7 bytes, too few/],
    ['a header longer than the file', rawSafetensors({ a }, 8, 5000n), /claims 5000 bytes, but the file has/],
    ['a header length beyond the format', rawSafetensors({ a }, 8, 1n << 40n), /claims 1099511627776 bytes, more than/],
    ['a header length of 64 bits', rawSafetensors({ a }, 8, (1n << 64n) - 1n), /18446744073709551615/],
    ['a header that is not JSON', rawSafetensors('{"a": nope}', 8), /not JSON/],
    ['a header that is no text', Buffer.concat([Buffer.from([2, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe])]), /not JSON/],
    ['a header that is a list', rawSafetensors('[]', 0), /not an object/],
    ['a truncated file', rawSafetensors({ a }, 5), /tensor "a": it ends at byte \d+, but the file has \d+/],
    ['offsets beyond the file', rawSafetensors({ a: entry([2000], 0, 8000) }, 8), /tensor "a": it ends at byte/],
    [
      'offsets in the wrong order',
      rawSafetensors({ a: entry([2], 8, 0) }, 8),
      /tensor "a": its data_offsets are \[8,0\]/,
    ],
    ['a negative offset', rawSafetensors({ a: entry([2], -8, 0) }, 8), /tensor "a": its data_offsets/],
    [
      'huge counts whose product overflows',
      rawSafetensors({ a: entry([2 ** 40, 2 ** 40], 0, 8) }, 8),
      /tensor "a": 8 bytes do not hold F32/,
    ],
    [
      'huge counts whose product is 0 in 64 bits',
      rawSafetensors({ a: entry([2 ** 33, 2 ** 31], 0, 0) }, 0),
      /0 bytes do not hold/,
    ],
    [
      'a shape that is no list of counts',
      rawSafetensors({ a: entry([-2], 0, 8) }, 8),
      /tensor "a": its shape is \[-2\]/,
    ],
    [
      'bytes that do not fit the dtype',
      rawSafetensors({ a: entry([2], 0, 8, 'F16') }, 8),
      /tensor "a": 8 bytes do not hold F16 \[2\]/,
    ],
    ['an unknown dtype', rawSafetensors({ a: entry([2], 0, 8, 'F31') }, 8), /tensor "a": its dtype is "F31"/],
    ['an entry without fields', rawSafetensors({ a: null }, 8), /tensor "a": its dtype is undefined/],
    [
      'an overlap',
      rawSafetensors({ a, b: entry([2], 4, 12) }, 12),
      /tensor "b": its bytes overlap another tensor's by 4/,
    ],
    ['a hole', rawSafetensors({ a, b: entry([2], 12, 20) }, 20), /tensor "b": 4 bytes before it belong to no tensor/],
    ['bytes left over', rawSafetensors({ a }, 12), /4 bytes at its end belong to no tensor/],
    [
      'a name twice',
      rawSafetensors(
        `{"a":${JSON.stringify(a)},"b":${JSON.stringify(entry([1], 8, 12))},"a":${JSON.stringify(a)}}`,
        12,
      ),
      /tensor "a": it is listed twice/,
    ],
    ['metadata that are no strings', rawSafetensors({ __metadata__: { n: 1 }, a }, 8), /__metadata__/],
  ])('%s', async (_, bytes, message) => {
    const file = fileWith(bytes);
    const error = await readSafetensorsHeader(file).catch((caught: unknown) => caught);
    expect(error).toMatchObject({ code: 'CHECKPOINT_CORRUPT', message: expect.stringMatching(message) });
    expect((error as Error).message).toContain(file);
  });
});

describe('writing', () => {
  const tensors = [
    { name: 'w', shape: [2, 3] },
    { name: 'b', shape: [3] },
  ];
  const data: Record<string, Float32Array> = {
    w: Float32Array.of(1, 2, 3, 4, 5, -6),
    b: Float32Array.of(0.5, -0, 1e-30),
  };
  const read = async (name: string) => data[name]!;

  test('what is written reads back, bit for bit, in the given order', async () => {
    const file = join(temporaryDirectory(), 'x.safetensors');
    await writeSafetensors(file, tensors, read);
    const header = await readSafetensorsHeader(file);
    expect([...header.keys()]).toEqual(['w', 'b']);
    for (const [name, tensor] of header) {
      expect(new Uint32Array((await readFloat32(tensor)).buffer)).toEqual(new Uint32Array(data[name]!.buffer));
    }
  });

  test('the header is deterministic, of aligned length, and says format pt', () => {
    const header = safetensorsHeader(tensors);
    expect(Buffer.from(safetensorsHeader(tensors)).equals(Buffer.from(header))).toBe(true);
    expect(header.length % 8).toBe(0);
    expect(JSON.parse(Buffer.from(header.subarray(8)).toString())).toEqual({
      __metadata__: { format: 'pt' },
      w: { dtype: 'F32', shape: [2, 3], data_offsets: [0, 24] },
      b: { dtype: 'F32', shape: [3], data_offsets: [24, 36] },
    });
  });

  test('a producer that fails leaves the old file as it was, and nothing beside it', async () => {
    const directory = temporaryDirectory();
    const file = join(directory, 'x.safetensors');
    await writeSafetensors(file, tensors, read);
    const before = readFileSync(file);
    const failing = async (name: string) => {
      if (name === 'b') throw new Error('engine closed');
      return data.w!;
    };
    await expect(writeSafetensors(file, tensors, failing)).rejects.toThrow('engine closed');
    await expect(writeSafetensors(file, tensors, async () => data.b!)).rejects.toMatchObject({
      code: 'CHECKPOINT_TENSOR_SHAPE',
    });
    expect(readFileSync(file).equals(before)).toBe(true);
    expect(readdirSync(directory)).toEqual(['x.safetensors']);
  });
});
