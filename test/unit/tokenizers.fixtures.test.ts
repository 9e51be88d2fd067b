/** Every tokenizer directory of the fixtures tree against what transformers makes of the same files. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { describe, expect, test } from 'vitest';
import { loadTokenizer, type Tokenizer } from '../../src/data/tokenizer.js';

interface Golden {
  vocab_size: number;
  special_tokens: Record<string, number>;
  bos_token_id: number | null;
  eos_token_id: number | null;
  pad_token_id: number | null;
  encodings: {
    text: string;
    ids: number[];
    ids_with_special: number[];
    decoded: string;
    decoded_skip_special: string;
  }[];
  decodings: { ids: number[]; prefixes?: string[]; text?: string; text_skip_special?: string }[];
  chat?: {
    name: string;
    add_generation_prompt: boolean;
    messages: { role: string; content: string }[];
    text?: string;
    ids?: number[];
    error?: string;
    assistant_mask?: number[];
  }[];
}

const root = join(process.env.LOCKSTEP_FIXTURES ?? 'test/fixtures', 'tokenizers');

const directories = (readdirSync(root, { recursive: true }) as string[])
  .filter((path) => path.endsWith('golden.json') && existsSync(join(root, dirname(path), 'tokenizer.json')))
  .map((path) => join(root, dirname(path)))
  .sort();

/** Pushes ids one by one: what was printed after each, and at the end. */
function streamed(tokenizer: Tokenizer, ids: readonly number[], skipSpecialTokens = false): string[] {
  const stream = tokenizer.stream({ skipSpecialTokens });
  let text = '';
  const printed = ids.map((id) => {
    text += stream.push(id);
    return text;
  });
  return [...printed, text + stream.finish()];
}

function sharedStart(a: string, b: string): string {
  let length = 0;
  while (length < a.length && a[length] === b[length]) length++;
  return a.slice(0, length);
}

test('the fixtures tree has tokenizers', () => {
  expect(directories.length).toBeGreaterThan(0);
});

describe.each(directories.map((directory) => [relative(root, directory), directory] as const))('%s', (_, directory) => {
  const golden = JSON.parse(readFileSync(join(directory, 'golden.json'), 'utf8')) as Golden;
  const opened = loadTokenizer(directory);

  test('vocabulary and named tokens', async () => {
    const tokenizer = await opened;
    expect(tokenizer.vocabularySize).toBe(golden.vocab_size);
    expect(Object.fromEntries(tokenizer.specialTokens)).toEqual(golden.special_tokens);
    expect(tokenizer.beginToken ?? null).toBe(golden.bos_token_id);
    expect(tokenizer.endToken ?? null).toBe(golden.eos_token_id);
    expect(tokenizer.padToken ?? null).toBe(golden.pad_token_id);
  });

  test.each(golden.encodings.map((item, i) => [i, item] as const))('encoding %i', async (_, item) => {
    const tokenizer = await opened;
    expect([...tokenizer.encode(item.text, { special: false })]).toEqual(item.ids);
    expect([...tokenizer.encode(item.text, { special: true })]).toEqual(item.ids_with_special);
    for (const [skipSpecialTokens, text] of [
      [false, item.decoded],
      [true, item.decoded_skip_special],
    ] as const) {
      expect(tokenizer.decode(item.ids_with_special, { skipSpecialTokens })).toBe(text);
      expect(streamed(tokenizer, item.ids_with_special, skipSpecialTokens).at(-1)).toBe(text);
    }
  });

  test.each(golden.decodings.map((item, i) => [i, item] as const))('decoding %i', async (_, { ids, ...item }) => {
    const tokenizer = await opened;
    if (item.text !== undefined) expect(tokenizer.decode(ids)).toBe(item.text);
    if (item.text_skip_special !== undefined) {
      expect(tokenizer.decode(ids, { skipSpecialTokens: true })).toBe(item.text_skip_special);
    }
    const printed = streamed(tokenizer, ids);
    const whole = tokenizer.decode(ids);
    expect(printed.at(-1)).toBe(whole);
    for (const text of printed) expect(whole.startsWith(text)).toBe(true);
    item.prefixes?.forEach((prefix, count) => {
      expect(tokenizer.decode(ids.slice(0, count))).toBe(prefix);
      if (count === 0) return;
      // Printed so far: nothing that this or any longer prefix takes back.
      for (const later of item.prefixes!.slice(count)) expect(later.startsWith(printed[count - 1]!)).toBe(true);
      // Nor later than one token after it was settled: a run of byte tokens ends with the token behind it.
      const settled = item.prefixes!.slice(count - 1).reduce(sharedStart);
      expect(printed[count - 1]!.startsWith(settled)).toBe(true);
    });
  });

  const chats = golden.chat ?? [];
  test.each(chats.map((item) => [item.name, item.add_generation_prompt, item] as const))(
    'chat %s, generation prompt %s',
    async (_, addGenerationPrompt, item) => {
      const tokenizer = await opened;
      if (item.error !== undefined) {
        expect(() => tokenizer.renderChat(item.messages, { addGenerationPrompt })).toThrow(
          expect.objectContaining({ code: 'CHAT_TEMPLATE_ERROR', message: expect.stringContaining(item.error) }),
        );
        return;
      }
      expect(tokenizer.renderChat(item.messages, { addGenerationPrompt })).toBe(item.text);
      expect([...tokenizer.encodeChat(item.messages, { addGenerationPrompt })]).toEqual(item.ids);
      if (item.assistant_mask === undefined) return;
      const { tokens, mask } = tokenizer.assistantMask(item.messages, { addGenerationPrompt });
      expect([...tokens]).toEqual(item.ids);
      expect([...mask]).toEqual(item.assistant_mask);
    },
  );
});
