import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { decodeUtf8, settledLength } from '../../../src/data/bytes.js';
import { loadTokenizer, loadTokenizerIfPresent } from '../../../src/data/tokenizer.js';
import { byteLevel, metaspace, temporaryDirectory, tokenizerDirectory } from './tokenizers.js';

const bytes = loadTokenizer(await tokenizerDirectory(byteLevel()));
const pieces = loadTokenizer(await tokenizerDirectory(metaspace()));

function generator(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

describe('UTF-8 is cut only where the text is settled', () => {
  test('random bytes, decoded in two parts anywhere that is settled, give the text of the whole', () => {
    const random = generator(1);
    const interesting = [0x41, 0x80, 0x9f, 0xa0, 0xbf, 0xc2, 0xe0, 0xe2, 0xed, 0xf0, 0xf4, 0xf5, 0xff, 0xef, 0xbb];
    let held = 0;
    for (let round = 0; round < 3000; round++) {
      const data = Uint8Array.from({ length: 6 }, () => interesting[Math.floor(random() * interesting.length)]!);
      for (let cut = 1; cut < data.length; cut++) {
        const settled = settledLength(data.subarray(0, cut));
        held += cut - settled;
        expect(decodeUtf8(data.subarray(0, settled)) + decodeUtf8(data.subarray(settled))).toBe(decodeUtf8(data));
      }
    }
    expect(held).toBeGreaterThan(0);
  });

  test('an unfinished character waits, a wrong one does not', () => {
    expect(settledLength(Uint8Array.of(0x61, 0xf0, 0x9f, 0x98))).toBe(1);
    expect(settledLength(Uint8Array.of(0xed, 0xa0))).toBe(2);
    expect(settledLength(Uint8Array.of(0xc3, 0xa9))).toBe(2);
  });
});

describe('encoding and decoding', () => {
  test('no tokens decode to no text', async () => {
    expect((await bytes).decode([])).toBe('');
    expect((await pieces).decode([])).toBe('');
  });

  test('the begin token comes with special, special tokens in the text are always recognised', async () => {
    const tokenizer = await bytes;
    expect([...tokenizer.encode('ab', { special: true })]).toEqual([300, 200]);
    expect([...tokenizer.encode('a</s>b', { special: false })]).toEqual([97, 301, 98]);
    expect(tokenizer.decode([300, 200, 301], { skipSpecialTokens: true })).toBe('ab');
    expect([tokenizer.beginToken, tokenizer.endToken, tokenizer.padToken]).toEqual([300, 301, undefined]);
  });

  test('a byte order mark inside text survives decoding', async () => {
    const tokenizer = await pieces;
    const ids = tokenizer.encode('\ufeffa\ufeff', { special: false });
    expect(tokenizer.decode(ids)).toBe('\ufeffa\ufeff');
  });

  test('a streamed character appears with its last byte, and not before', async () => {
    const stream = (await bytes).stream();
    expect([stream.push(0x61), stream.push(0xc3), stream.push(0xa9), stream.finish()]).toEqual(['a', '', 'é', '']);
    const cut = (await bytes).stream();
    expect([cut.push(0xc3), cut.push(0x62), cut.push(0xc3), cut.finish()]).toEqual(['', '\ufffdb', '', '\ufffd']);
  });

  test('random ids stream to exactly what they decode to', async () => {
    const random = generator(2);
    for (const tokenizer of [await bytes, await pieces]) {
      const known = Array.from({ length: tokenizer.vocabularySize }, (_, id) => id).filter((id) => {
        try {
          return tokenizer.token(id) !== '';
        } catch {
          return false;
        }
      });
      for (let round = 0; round < 200; round++) {
        const ids = Array.from({ length: 20 }, () => known[Math.floor(random() * known.length)]!);
        for (const skipSpecialTokens of [false, true]) {
          const stream = tokenizer.stream({ skipSpecialTokens });
          const text = ids.map((id) => stream.push(id)).join('') + stream.finish();
          expect(text).toBe(tokenizer.decode(ids, { skipSpecialTokens }));
        }
      }
    }
  });

  test('a token beyond the vocabulary or in a gap of it is an error that names it', async () => {
    const tokenizer = await bytes;
    for (const id of [304, -1, 250]) {
      expect(() => tokenizer.decode([97, id])).toThrow(
        expect.objectContaining({ code: 'TOKEN_OUT_OF_RANGE', message: expect.stringContaining(`Token ${id} `) }),
      );
    }
  });

  test('a continuation decodes behind its prompt as it was written, and never changes the prompt', async () => {
    for (const tokenizer of [await bytes, await pieces]) {
      for (const [before, text] of [
        ['a', 'b'],
        ['a b', ' a'],
        ['a', ' b'],
        ['a ', 'b'],
        ['', 'a'],
        ['b', ''],
      ] as const) {
        const head = tokenizer.encode(before, { special: false });
        const tail = tokenizer.encodeContinuation(before, text);
        expect(tokenizer.decode([...head, ...tail])).toBe(before + text);
      }
    }
  });
});

describe('the parts of tokenizer.json', () => {
  const words = async (files: ReturnType<typeof byteLevel>, text: string) => {
    const tokenizer = await loadTokenizer(await tokenizerDirectory(files));
    return Array.from(tokenizer.encode(text, { special: false }), (id) => tokenizer.token(id));
  };
  const withAdded = (fields: Record<string, unknown>) => {
    const files = byteLevel();
    (files.tokenizer.added_tokens as unknown[]).push({ id: 310, content: '[x]', special: false, ...fields });
    (files.tokenizer.added_tokens as unknown[]).push({ id: 311, content: '[x]y', special: false, ...fields });
    return files;
  };

  test('the longest added token that begins first is taken', async () => {
    expect(await words(withAdded({ normalized: false }), '[[x]yz[x]')).toEqual(['[', '[x]y', 'z', '[x]']);
    expect(await words(withAdded({ normalized: true }), '[[x]yz[x]')).toEqual(['[', '[x]y', 'z', '[x]']);
  });

  test('added tokens swallow white space, or stand between other characters, as they ask', async () => {
    expect(await words(withAdded({ lstrip: true }), 'a \n[x] b')).toEqual(['a', '[x]', 'Ġ', 'b']);
    expect(await words(withAdded({ rstrip: true }), 'a [x] \nb')).toEqual(['a', 'Ġ', '[x]', 'b']);
    expect(await words(withAdded({ single_word: true }), 'a[x] [x]')).toEqual(['a', '[', 'x', ']', 'Ġ', '[x]']);
  });

  test('a prefix space is added once where it is asked for', async () => {
    const files = byteLevel();
    files.tokenizer.pre_tokenizer = { type: 'ByteLevel', add_prefix_space: true };
    expect(await words(files, 'a</s> a')).toEqual(['Ġ', 'a', '</s>', 'Ġ', 'a']);
  });

  test('white space is what Unicode says: U+FEFF is not, so a space before it stays with it', async () => {
    const files = byteLevel();
    Object.assign((files.tokenizer.model as { vocab: object }).vocab, { ï: 1, '»': 2, '¿': 3, Ġï: 4 });
    (files.tokenizer.model as { merges: string[] }).merges.push('Ġ ï');
    expect(await words(files, 'a \ufeff')).toEqual(['a', 'Ġï', '»', '¿']);
  });

  test.each([
    ['Isolated', ['a', '.', '.', 'b']],
    ['Removed', ['a', 'b']],
    ['MergedWithPrevious', ['a.', '.', 'b']],
    ['MergedWithNext', ['a', '.', '.b']],
    ['Contiguous', ['a', '..', 'b']],
  ])('Split with behavior %s', async (behavior, expected) => {
    const files = byteLevel();
    files.tokenizer.pre_tokenizer = { type: 'Split', pattern: { String: '.' }, behavior, invert: false };
    Object.assign((files.tokenizer.model as { vocab: object }).vocab, { 'a.': 400, '.b': 401, '..': 402 });
    (files.tokenizer.model as { merges: string[] }).merges.push('. .', 'a .', '. b');
    expect(await words(files, 'a..b')).toEqual(expected);
  });

  test.each([
    ['first', ['▁a', '▁', '</s>', 'b']],
    ['always', ['▁a', '▁', '</s>', '▁b']],
    ['never', ['a', '▁', '</s>', 'b']],
  ])('Metaspace with prepend_scheme %s', async (scheme, expected) => {
    const files = metaspace();
    Object.assign(files.tokenizer.pre_tokenizer as object, { prepend_scheme: scheme });
    expect(await words(files, 'a </s>b')).toEqual(expected);
  });

  test('Metaspace splits before every mark unless told not to', async () => {
    const files = metaspace();
    Object.assign((files.tokenizer.model as { vocab: object }).vocab, { '▁▁': 6 });
    (files.tokenizer.model as { merges: string[][] }).merges.unshift(['▁', '▁']);
    expect(await words(files, 'a  ')).toEqual(['▁a', '▁▁']);
    Object.assign(files.tokenizer.pre_tokenizer as object, { split: true });
    expect(await words(files, 'a  ')).toEqual(['▁a', '▁', '▁']);
  });

  test('Metaspace decodes the marks of the first token to nothing unless nothing was prepended', async () => {
    for (const [scheme, text] of [
      ['first', 'a b'],
      ['never', ' a b'],
    ]) {
      const files = metaspace();
      files.tokenizer.decoder = { type: 'Metaspace', replacement: '▁', prepend_scheme: scheme };
      expect((await loadTokenizer(await tokenizerDirectory(files))).decode([4, 5])).toBe(text);
    }
  });
});

describe('chats', () => {
  const messages = [
    { role: 'user', content: 'a' },
    { role: 'assistant', content: 'b' },
  ];

  test('a template file wins over the configuration; without either there is none', async () => {
    const directory = await tokenizerDirectory(byteLevel());
    await writeFile(join(directory, 'chat_template.jinja'), '{{ messages[0].content }}!');
    expect((await loadTokenizer(directory)).renderChat(messages)).toBe('a!');
    const plain = await pieces;
    expect(() => plain.renderChat(messages)).toThrow(expect.objectContaining({ code: 'CHAT_TEMPLATE_MISSING' }));
  });

  test('the default of named templates is taken', async () => {
    const files = byteLevel();
    files.config.chat_template = [
      { name: 'tool_use', template: 'tools' },
      { name: 'default', template: 'plain' },
    ];
    expect((await loadTokenizer(await tokenizerDirectory(files))).renderChat(messages)).toBe('plain');
  });

  test('a composed character across the boundary counts as the answer', async () => {
    const tokenizer = await bytes;
    const { tokens, mask } = tokenizer.assistantMask([{ role: 'assistant', content: 'e\u0301b' }]);
    const learned = [...tokens].filter((_, i) => mask[i] === 1);
    expect(tokenizer.decode(learned)).toBe('éb<|im_end|>');
  });

  test('earlier assistant turns can be left to the prompt', async () => {
    const tokenizer = await bytes;
    const { tokens, mask } = tokenizer.assistantMask([...messages, ...messages], { from: 2 });
    expect(tokenizer.decode([...tokens].filter((_, i) => mask[i] === 1))).toBe('b<|im_end|>');
    expect(mask.indexOf(1)).toBeGreaterThan(tokens.length / 2);
  });

  test('a template that rewrites earlier turns still has its assistant found', async () => {
    const files = byteLevel();
    files.config.chat_template =
      "{% for m in messages %}<|im_start|>{{ m.role }}:{{ (m.content ~ '!') if loop.last else m.content }}<|im_end|>" +
      '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}';
    const tokenizer = await loadTokenizer(await tokenizerDirectory(files));
    const { tokens, mask } = tokenizer.assistantMask([...messages, ...messages]);
    expect(tokenizer.decode([...tokens].filter((_, i) => mask[i] === 1))).toBe('b<|im_end|>b!<|im_end|>');
  });

  test('a template that hides the answer is an error', async () => {
    const files = byteLevel();
    files.config.chat_template = '{{ messages | length }}';
    const tokenizer = await loadTokenizer(await tokenizerDirectory(files));
    expect(() => tokenizer.assistantMask(messages)).toThrow(expect.objectContaining({ code: 'CHAT_TEMPLATE_ERROR' }));
  });
});

describe('directories that are not tokenizers', () => {
  test('vocab.json and merges.txt alone are refused with the file that is needed', async () => {
    const directory = await temporaryDirectory();
    await writeFile(join(directory, 'vocab.json'), '{}');
    await writeFile(join(directory, 'merges.txt'), '');
    await expect(loadTokenizer(directory)).rejects.toMatchObject({
      code: 'TOKENIZER_MISSING',
      message: expect.stringMatching(/tokenizer\.json \(vocab\.json and merges\.txt found/),
    });
    expect(await loadTokenizerIfPresent(directory)).toBeUndefined();
  });

  test('broken JSON and an unknown decoder are named', async () => {
    const directory = await tokenizerDirectory(byteLevel());
    await writeFile(join(directory, 'tokenizer.json'), '{"model": ');
    await expect(loadTokenizer(directory)).rejects.toMatchObject({
      code: 'TOKENIZER_INVALID',
      message: expect.stringContaining(join(directory, 'tokenizer.json')),
    });
    const files = byteLevel();
    files.tokenizer.decoder = { type: 'CTC' };
    await expect(loadTokenizer(await tokenizerDirectory(files))).rejects.toMatchObject({
      code: 'TOKENIZER_UNSUPPORTED',
      message: expect.stringContaining('"CTC"'),
    });
  });
});
