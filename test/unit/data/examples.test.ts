import { describe, expect, test } from 'vitest';
import { checkTokens, toPair, toPrompt, toTrainingExample } from '../../../src/data/examples.js';
import { parseRow } from '../../../src/data/rows.js';
import { loadTokenizer } from '../../../src/data/tokenizer.js';
import { byteLevel, tokenizerDirectory } from './tokenizers.js';

const tokenizer = await loadTokenizer(await tokenizerDirectory(byteLevel()));
const place = { file: 'data.jsonl', line: 7 };
const row = (columns: Record<string, unknown>) => parseRow(columns, place);
const learned = (columns: Record<string, unknown>) => {
  const { tokens, mask } = toTrainingExample(row(columns), tokenizer);
  expect(mask.length).toBe(tokens.length);
  return [tokenizer.decode(tokens), tokenizer.decode([...tokens].filter((_, i) => mask[i] === 1))];
};
const pair = (columns: Record<string, unknown>, options = {}) => {
  const { chosen, rejected, chosenMask, rejectedMask, margin } = toPair(row(columns), tokenizer, options);
  const promptLength = chosenMask.indexOf(1);
  const words = (tokens: Int32Array) => tokenizer.decode(tokens.subarray(promptLength));
  expect([...chosen.subarray(0, promptLength)]).toEqual([...rejected.subarray(0, promptLength)]);
  expect(rejectedMask.indexOf(1)).toBe(rejected.length > promptLength ? promptLength : -1);
  return [tokenizer.decode(chosen.subarray(0, promptLength)), words(chosen), words(rejected), margin];
};
const dialogue = (answer: string) => `\n\nHuman: hi\n\nAssistant: yes\n\nHuman: so?\n\nAssistant:${answer}`;

describe('rows', () => {
  test.each([
    [{ tokens: [1, -2] }, /tokens\[1\]: expected a token id .*received -2/],
    [{ tokens: [] }, /tokens: expected at least one/],
    [{ tokens: [1, 2], mask: [1] }, /mask has 1 entries for 2 tokens/],
    [{ tokens: [1], mask: [2] }, /mask\[0\]: expected 0 or 1, received 2/],
    [{ tokens: 'a' }, /tokens: expected an array, received "a"/],
    [{ text: 5 }, /text: expected a string, received 5/],
    [{ prompt: 'a', response: [{ role: 'assistant', content: 'b' }] }, /response is messages and prompt is text/],
    [{ messages: [] }, /messages: expected at least one message/],
    [{ messages: [{ content: 'a' }] }, /messages\[0\]: expected a message with a "role"/],
    [{ messages: [{ role: 'user' }] }, /messages\[0\]\.content: expected a string, received nothing/],
    [{ chosen: 'a' }, /rejected is missing/],
    [{ chosen: 'a', rejected: 'b', margin: 'big' }, /margin: expected a finite number, received "big"/],
    [{ chosen: 'a', rejected: [1] }, /chosen is text and rejected is tokens/],
    [{ prompt: null, answer: 1 }, /expected the columns of a row.*received prompt, answer/],
  ])('%j is refused with its reason', (columns, reason) => {
    expect(() => row(columns)).toThrow(
      expect.objectContaining({
        code: 'DATA_BAD_ROW',
        message: expect.stringMatching(new RegExp(`^data\\.jsonl, line 7: .*${reason.source}`)),
      }),
    );
  });

  test('other columns stay with the row, null ones count as absent', () => {
    const parsed = row({ prompt: 'a', response: null, answer: 42 });
    expect(parsed).toMatchObject({ kind: 'prompt', prompt: 'a', columns: { answer: 42 } });
    expect(parsed).not.toHaveProperty('response');
  });
});

describe('training examples', () => {
  test('a text is learned whole, with its end token, except the first token that nothing predicts', () => {
    expect(learned({ text: 'abc' })).toEqual(['<s>abc</s>', 'abc</s>']);
    expect(learned({ text: '' })).toEqual(['<s></s>', '</s>']);
  });

  test('a response is learned with its end token, once', () => {
    expect(learned({ prompt: 'a', response: 'b' })).toEqual(['<s>ab</s>', 'b</s>']);
    expect(learned({ prompt: 'a', response: '' })).toEqual(['<s>a</s>', '</s>']);
    expect(learned({ prompt: 'a', response: 'b</s>' })).toEqual(['<s>ab</s>', 'b</s>']);
  });

  test('prompt and response are closed against each other', () => {
    const { tokens } = toTrainingExample(row({ prompt: 'a', response: 'b' }), tokenizer);
    expect([...tokens]).toEqual([300, 97, 98, 301]);
  });

  test('assistant turns of a chat are learned', () => {
    const messages = [
      { role: 'user', content: 'a' },
      { role: 'assistant', content: 'b' },
    ];
    const text = '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n';
    expect(learned({ messages })).toEqual([text, 'b<|im_end|>']);
    expect(learned({ prompt: [messages[0]], response: 'b' })).toEqual([text, 'b<|im_end|>']);
    expect(learned({ prompt: [messages[0]], response: [messages[1]] })).toEqual([text, 'b<|im_end|>']);
  });

  test('tokens are learned as the mask says, all but the first without one, and need no tokenizer', () => {
    expect([...toTrainingExample(row({ tokens: [5, 6, 7] }), undefined).mask]).toEqual([0, 1, 1]);
    const parsed = row({ tokens: [5, 6, 7], mask: [1, 0, true] });
    const example = toTrainingExample(parsed, undefined);
    expect([[...example.tokens], [...example.mask]]).toEqual([
      [5, 6, 7],
      [0, 0, 1],
    ]);
    expect([...(parsed as { mask: Uint8Array }).mask]).toEqual([1, 0, 1]);
  });

  test('rows without something to learn, a tokenizer or an end token are refused', async () => {
    expect(() => toTrainingExample(row({ prompt: 'a' }), tokenizer)).toThrow(
      /line 7: the row has a prompt but no resp/,
    );
    expect(() => toTrainingExample(row({ chosen: 'a', rejected: 'b' }), tokenizer)).toThrow(/chosen and rejected/);
    expect(() => toTrainingExample(row({ text: 'a' }), undefined, { directory: 'models/m' })).toThrow(
      expect.objectContaining({
        code: 'TOKENIZER_MISSING',
        message: expect.stringMatching(/line 7: .*models\/m has no tokenizer\.json/),
      }),
    );
    const files = byteLevel();
    files.config.eos_token = null;
    const endless = await loadTokenizer(await tokenizerDirectory(files));
    expect(() => toTrainingExample(row({ text: 'a' }), endless)).toThrow(
      expect.objectContaining({ code: 'END_TOKEN_MISSING' }),
    );
  });
});

describe('pairs', () => {
  test('two dialogues share the prompt up to the last turn of the assistant that both have', () => {
    expect(pair({ chosen: dialogue(' good'), rejected: dialogue(' got') })).toEqual([
      `<s>${dialogue('')}`,
      ' good',
      ' got',
      0,
    ]);
  });

  test('an empty answer is an answer', () => {
    expect(pair({ chosen: dialogue(' x'), rejected: dialogue(''), margin: 1.5 })).toEqual([
      `<s>${dialogue('')}`,
      ' x',
      '',
      1.5,
    ]);
  });

  test('the last turn that both share counts, not the last that either has', () => {
    const [prompt, chosen] = pair({ chosen: dialogue(' x\n\nHuman: q\n\nAssistant: y'), rejected: dialogue(' z') });
    expect([prompt, chosen]).toEqual([`<s>${dialogue('')}`, ' x\n\nHuman: q\n\nAssistant: y']);
  });

  test('answers to a prompt column follow it; unshared strings have no prompt', () => {
    expect(pair({ prompt: 'a', chosen: 'b', rejected: 'c' })).toEqual(['<s>a', 'b', 'c', 0]);
    expect(pair({ prompt: 'a', chosen: 'b', rejected: '' }, { endToken: true })).toEqual(['<s>a', 'b</s>', '</s>', 0]);
    expect(pair({ chosen: 'xa', rejected: 'xb' })).toEqual(['<s>', 'xa', 'xb', 0]);
    expect(pair({ chosen: [97, 98], rejected: [97, 99] })).toEqual(['a', 'b', 'c', 0]);
  });

  test('chats answer with the messages after those they share', () => {
    const user = { role: 'user', content: 'a' };
    const say = (content: string) => [user, { role: 'assistant', content }];
    const prompt = '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n';
    const expected = [prompt, 'b<|im_end|>\n', 'c<|im_end|>\n', 0];
    expect(pair({ chosen: say('b'), rejected: say('c') })).toEqual(expected);
    expect(pair({ prompt: [user], chosen: [say('b')[1]], rejected: [say('c')[1]] })).toEqual(expected);
    expect(pair({ prompt: [user], chosen: 'b', rejected: 'c' })).toEqual(expected);
    expect(pair({ chosen: say('b'), rejected: say('b') })).toEqual([prompt, 'b<|im_end|>\n', 'b<|im_end|>\n', 0]);
    const turns = [...say('b'), ...say('c')];
    expect(pair({ chosen: turns, rejected: [...say('b'), ...say('d')] })[1]).toBe('c<|im_end|>\n');
  });

  test('of an answer of several turns, those of the assistant are marked', () => {
    const chosen = ['user', 'assistant', 'user', 'assistant'].map((role, i) => ({ role, content: 'acQe'[i] }));
    const rejected = [chosen[0], { role: 'assistant', content: 'f' }];
    const both = toPair(row({ chosen, rejected }), tokenizer);
    const marked = (tokens: Int32Array, mask: Uint8Array) => tokenizer.decode([...tokens].filter((_, i) => mask[i]));
    expect(marked(both.chosen, both.chosenMask)).toBe(learned({ messages: chosen })[1]);
    expect(marked(both.chosen, both.chosenMask)).not.toMatch(/Q|user|start/);
    expect(marked(both.rejected, both.rejectedMask)).toBe(learned({ messages: rejected })[1]);
  });
});

describe('prompts', () => {
  const prompt = (columns: Record<string, unknown>) => {
    const { tokens, row: source } = toPrompt(row(columns), tokenizer);
    expect(source.columns).toBe(columns);
    return tokenizer.decode(tokens);
  };

  test('every kind of row has one', () => {
    expect(prompt({ prompt: 'ab', response: 'c' })).toBe('<s>ab');
    expect(prompt({ text: 'ab' })).toBe('<s>ab');
    expect(prompt({ tokens: [97, 98] })).toBe('ab');
    expect(prompt({ prompt: [97, 98] })).toBe('ab');
    expect(prompt({ chosen: dialogue(' x'), rejected: dialogue(' y') })).toBe(`<s>${dialogue('')}`);
    expect(prompt({ messages: [{ role: 'user', content: 'a' }] })).toBe(
      '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n',
    );
  });

  test('what answers a dialogue at its end is left out, and what was said before stays', () => {
    const [user, assistant] = ['user', 'assistant'].map((role) => (content: string) => ({ role, content }));
    const before = [user!('a'), assistant!('b'), user!('c')];
    const expected = prompt({ messages: before });
    expect(prompt({ messages: [...before, assistant!('d')] })).toBe(expected);
    expect(prompt({ messages: [...before, assistant!('d'), assistant!('e')] })).toBe(expected);
    expect(expected).toMatch(/b<\|im_end\|>\n<\|im_start\|>user\nc<\|im_end\|>\n<\|im_start\|>assistant\n$/);
    expect(() => prompt({ messages: [assistant!('d')] })).toThrow(
      /data.jsonl, line 7: the messages are all of the assistant/,
    );
  });

  test('the prompt of a rollout is the beginning of what is learned and compared', () => {
    for (const columns of [
      { prompt: 'a', response: 'b' },
      { prompt: 'a b', response: ' ab' },
    ]) {
      const { tokens } = toTrainingExample(row(columns), tokenizer);
      const start = toPrompt(row(columns), tokenizer).tokens;
      expect([...tokens.subarray(0, start.length)]).toEqual([...start]);
    }
  });

  test('a template that raises names the row', async () => {
    const files = byteLevel();
    files.config.chat_template = "{{ raise_exception('no such role') }}";
    const strict = await loadTokenizer(await tokenizerDirectory(files));
    for (const convert of [toPrompt, toTrainingExample]) {
      expect(() => convert(row({ messages: [{ role: 'user', content: 'a' }] }), strict)).toThrow(
        expect.objectContaining({
          code: 'CHAT_TEMPLATE_ERROR',
          message: expect.stringMatching(/line 7: .*no such role/),
        }),
      );
    }
  });
});

test('a token that the model lacks is refused with its place', () => {
  checkTokens(Int32Array.of(0, 9), 10, place);
  expect(() => checkTokens(Int32Array.of(0, 10), 10, place)).toThrow(
    expect.objectContaining({
      code: 'TOKEN_OUT_OF_RANGE',
      message: expect.stringMatching(/^data\.jsonl, line 7: token 10 at position 1 .*vocabulary of 10/),
    }),
  );
});
