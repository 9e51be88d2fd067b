/** Small tokenizers written by hand, as directories. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll } from 'vitest';

type Json = Record<string, unknown>;

const special = (id: number, content: string): Json => ({ id, content, special: true, normalized: false });

export const chatMl =
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}" +
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/** Printable ASCII and the newline as single byte-level tokens, "ab" merged, a begin token, ChatML. */
export function byteLevel(): { tokenizer: Json; config: Json } {
  const vocab: Record<string, number> = {};
  for (let code = 0x21; code < 0x7f; code++) vocab[String.fromCharCode(code)] = code;
  vocab.Ġ = 0x20;
  vocab.Ċ = 0x0a;
  vocab.Ã = 0xc3;
  vocab['©'] = 0xa9;
  vocab.ab = 200;
  const tokenizer = {
    added_tokens: [special(300, '<s>'), special(301, '</s>'), special(302, '<|im_start|>'), special(303, '<|im_end|>')],
    normalizer: { type: 'NFC' },
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, use_regex: true },
    post_processor: {
      type: 'TemplateProcessing',
      single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
      pair: [],
      special_tokens: { '<s>': { id: '<s>', ids: [300], tokens: ['<s>'] } },
    },
    decoder: { type: 'ByteLevel' },
    model: { type: 'BPE', vocab, merges: ['a b'], unk_token: null },
  };
  return { tokenizer, config: { bos_token: '<s>', eos_token: { content: '</s>' }, chat_template: chatMl } };
}

/** SentencePiece style: a space is prepended and becomes U+2581; unknown characters fall back to bytes. */
export function metaspace(): { tokenizer: Json; config: Json } {
  const vocab: Record<string, number> = { '<unk>': 0, '\u2581': 1, a: 2, b: 3, '\u2581a': 4, '\u2581b': 5 };
  for (let byte = 0; byte < 256; byte++) vocab[`<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`] = 10 + byte;
  const tokenizer = {
    added_tokens: [special(0, '<unk>'), special(300, '<s>'), special(301, '</s>')],
    normalizer: null,
    pre_tokenizer: { type: 'Metaspace', replacement: '\u2581', prepend_scheme: 'first', split: false },
    post_processor: null,
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: '\u2581' }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        { type: 'Strip', content: ' ', start: 1, stop: 0 },
      ],
    },
    model: {
      type: 'BPE',
      vocab,
      merges: [
        ['\u2581', 'a'],
        ['\u2581', 'b'],
      ],
      unk_token: '<unk>',
      byte_fallback: true,
      fuse_unk: true,
    },
  };
  return { tokenizer, config: { bos_token: '<s>', eos_token: '</s>' } };
}

const made: string[] = [];

afterAll(async () => {
  for (const directory of made) await rm(directory, { recursive: true });
});

/** A new directory, removed after the test file. */
export async function temporaryDirectory(): Promise<string> {
  const directory = await mkdtemp(join(tmpdir(), 'lockstep-data-'));
  made.push(directory);
  return directory;
}

/** Writes a tokenizer's files into a new directory. */
export async function tokenizerDirectory(files: { tokenizer: Json; config: Json }): Promise<string> {
  const directory = await temporaryDirectory();
  await writeFile(join(directory, 'tokenizer.json'), JSON.stringify(files.tokenizer));
  await writeFile(join(directory, 'tokenizer_config.json'), JSON.stringify(files.config));
  return directory;
}

/** Objects as the lines of a file. */
export async function jsonlFile(rows: readonly unknown[]): Promise<string> {
  const path = join(await temporaryDirectory(), 'data.jsonl');
  await writeFile(path, rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
  return path;
}
