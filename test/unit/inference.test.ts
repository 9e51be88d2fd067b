import { mkdtemp, readFile, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { openCheckpoint } from '../../src/checkpoints/hugging-face.js';
import { openEach } from '../../src/inference/backend.js';
import { type Completion, type GenerateSettings, generate } from '../../src/inference/generate.js';
import { endTokensOf, openModel } from '../../src/inference/open-model.js';
import { type Scored, score } from '../../src/inference/score.js';
import { tableBackend, writeTableModel } from './train-fake-engine.js';

const rows = (...columns: Record<string, unknown>[]) =>
  columns.map((row, i) => ({ columns: row, place: { file: 'in.jsonl', line: i + 1 } }));
const inputs = rows(
  ...Array.from({ length: 40 }, (_, i) => ({
    tokens: Array.from({ length: 1 + (i % 5) }, (_, k) => 2 + ((i * 3 + k) % 20)),
  })),
);

async function collect<T>(results: AsyncIterable<T>): Promise<T[]> {
  const all: T[] = [];
  for await (const result of results) all.push(result);
  return all;
}

const model = await writeTableModel();
const options = (directory = model) => ({ model: directory, backend: tableBackend });
const samples = (settings: GenerateSettings, given = inputs, directory = model): Promise<Completion[]> =>
  collect(generate(options(directory), given, settings));
const scored = (given = inputs, directory = model): Promise<Scored[]> => collect(score(options(directory), given));

describe('generate', () => {
  it('gives results in order, samples of a row together', async () => {
    const results = await samples({ samples: 3, maxNewTokens: 4 });
    expect(results.map(({ index, sample }) => [index, sample])).toEqual(
      inputs.flatMap((_, i) => [0, 1, 2].map((s) => [i, s])),
    );
    expect(new Set(results.slice(0, 3).map(({ tokens }) => tokens.join())).size).toBeGreaterThan(1);
  });

  it('depends on seed and row, not on what else is asked', async () => {
    const all = await samples({ seed: 5, maxNewTokens: 8 });
    const some = await samples({ seed: 5, maxNewTokens: 8 }, inputs.slice(0, 7));
    expect(some.map(({ tokens }) => tokens)).toEqual(all.slice(0, 7).map(({ tokens }) => tokens));
    expect((await samples({ seed: 6, maxNewTokens: 8 })).map(({ tokens }) => tokens)).not.toEqual(
      all.map(({ tokens }) => tokens),
    );
  });

  it('has log-probs that scoring the sequences gives back', async () => {
    const results = await samples({ maxNewTokens: 8 });
    const sequences = rows(...results.map(({ prompt, tokens }) => ({ tokens: [...prompt, ...tokens] })));
    (await scored(sequences)).forEach(({ logprobs }, i) => {
      expect(logprobs!.subarray(results[i]!.prompt.length - 1)).toEqual(results[i]!.logprobs);
    });
  });

  it.each([
    ['topP', -0.5],
    ['topP', 0],
    ['topP', 1.5],
    ['topP', Number.NaN],
    ['temperature', -1],
    ['temperature', Number.NaN],
    ['temperature', Number.POSITIVE_INFINITY],
    ['topK', -1],
    ['topK', 1.5],
    ['seed', 0.5],
    ['samples', 0],
    ['maxNewTokens', 0],
  ])('refuses %s %d, before it opens the model', async (key, value) => {
    await expect(samples({ [key]: value }, inputs, '/no/such/model')).rejects.toMatchObject({
      code: 'SAMPLING_INVALID',
      message: expect.stringMatching(new RegExp(`^${key}: expected .*, received ${value}$`)),
    });
  });

  it('stops at the end token, which is part of the result, unless told to go on', async () => {
    const results = await samples({ maxNewTokens: 50 });
    const stopped = results.filter(({ finish }) => finish === 'stop');
    expect(stopped.length).toBeGreaterThan(0);
    for (const { tokens } of stopped) expect([tokens.at(-1), tokens.indexOf(1)]).toEqual([1, tokens.length - 1]);
    const on = await samples({ maxNewTokens: 50, ignoreEndTokens: true });
    expect(on.every(({ tokens, finish }) => tokens.length === 50 && finish === 'length')).toBe(true);
  });

  it('takes plain columns, and names their place by number', async () => {
    const plain = collect(generate(options(), [{ tokens: [2, 3] }, { tokens: [99] }], { maxNewTokens: 2 }));
    await expect(plain).rejects.toThrow(/input, line 2: token 99/);
    const [one] = await collect(generate(options(), [{ tokens: [2, 3] }], { maxNewTokens: 2 }));
    const [same] = await samples({ maxNewTokens: 2 }, rows({ tokens: [2, 3] }));
    expect(one).toEqual(same);
  });

  it('gives no text for rows of tokens', async () => {
    expect((await samples({ maxNewTokens: 2 }))[0]).not.toHaveProperty('text');
  });

  it.each([
    [{ tokens: Array(60).fill(2) }, 'PROMPT_TOO_LONG', /in\.jsonl, line 1.*60 tokens and 5 new.*64 positions/],
    [{ tokens: [2, 24] }, 'TOKEN_OUT_OF_RANGE', /token 24 at position 1/],
    [{ prompt: 'text' }, 'TOKENIZER_MISSING', /no tokenizer\.json/],
    [{ question: 'x' }, 'DATA_BAD_ROW', /received question/],
  ])('names what is wrong with a row: %j', async (row, code, message) => {
    await expect(samples({ maxNewTokens: 5 }, rows(row))).rejects.toMatchObject({
      code,
      message: expect.stringMatching(message),
    });
  });

  it('refuses stop strings without a tokenizer', async () => {
    await expect(samples({ stop: ['x'] })).rejects.toMatchObject({
      code: 'TOKENIZER_MISSING',
      details: { key: 'stop' },
    });
  });
});

describe('text', () => {
  const fixture = 'test/fixtures/models/llama';
  const withTokenizer = async () => {
    const vocabulary = JSON.parse(await readFile(join(fixture, 'config.json'), 'utf8')).vocab_size;
    const directory = await writeTableModel({ vocab_size: vocabulary, max_position_embeddings: 256 });
    for (const file of ['tokenizer.json', 'tokenizer_config.json']) {
      await writeFile(join(directory, file), await readFile(join(fixture, file)));
    }
    return directory;
  };

  it('streams to what the result says, and ends before a stop string', async () => {
    const directory = await withTokenizer();
    const row = rows({ prompt: 'the river' });
    const [plain] = await samples({ maxNewTokens: 60, ignoreEndTokens: true }, row, directory);
    const stop = plain!.text!.slice(25, 28);
    for (const settings of [{}, { stop: [stop] }]) {
      let live = '';
      const onText = (piece: string) => {
        live += piece;
      };
      const [result] = await samples({ maxNewTokens: 60, ignoreEndTokens: true, onText, ...settings }, row, directory);
      expect(live).toBe(result!.text);
    }
    const [cut] = await samples({ maxNewTokens: 60, ignoreEndTokens: true, stop: [stop] }, row, directory);
    expect(cut!.finish).toBe('stop');
    expect(cut!.text).toBe(plain!.text!.slice(0, plain!.text!.indexOf(stop)));
    expect(cut!.tokens).toEqual(plain!.tokens.subarray(0, cut!.tokens.length));
    expect(cut!.logprobs).toHaveLength(cut!.tokens.length);
  });
});

describe('score', () => {
  it('gives n-1 log-probs and n entropies of a language model, in order', async () => {
    const results = await scored();
    results.forEach(({ index, logprobs, entropies, tokens }, i) => {
      expect([index, [...tokens]]).toEqual([i, inputs[i]!.columns.tokens]);
      expect([logprobs!.length, entropies!.length]).toEqual([tokens.length - 1, tokens.length]);
    });
  });

  it('does not depend on how rows are packed', async () => {
    const alone = await Promise.all(inputs.slice(0, 5).map(async (input) => (await scored([input]))[0]!.logprobs));
    expect((await scored()).slice(0, 5).map(({ logprobs }) => logprobs)).toEqual(alone);
  });

  it('gives one score of a sequence classifier, past trailing padding', async () => {
    const directory = await writeTableModel({
      architectures: ['LlamaForSequenceClassification'],
      num_labels: 1,
      pad_token_id: 0,
    });
    const [plain, padded] = await scored(rows({ tokens: [3, 4] }, { tokens: [3, 4, 0, 0] }), directory);
    expect(plain).toEqual({ index: 0, tokens: Int32Array.of(3, 4), score: expect.any(Number) });
    expect(padded!.score).toBe(plain!.score);
  });

  it('gives n values of a value head', async () => {
    const directory = await writeTableModel({ architectures: ['LlamaForTokenClassification'], num_labels: 1 });
    const [result] = await scored(rows({ tokens: [3, 4, 5] }), directory);
    expect(result).toEqual({ index: 0, tokens: expect.anything(), values: expect.any(Float32Array) });
    expect(result!.values).toHaveLength(3);
  });

  it.each([
    [{ tokens: Array(65).fill(2) }, 'ROW_TOO_LONG', /line 1.*65 tokens.*64 positions/],
    [{ tokens: [99999] }, 'TOKEN_OUT_OF_RANGE', /99999/],
  ])('names what is wrong with a row: %j', async (row, code, message) => {
    await expect(scored(rows(row))).rejects.toMatchObject({ code, message: expect.stringMatching(message) });
  });
});

describe('end tokens', () => {
  it('are those of generation_config.json, else of config.json', async () => {
    const directory = await mkdtemp(join(tmpdir(), 'lockstep-end-'));
    const checkpoint = await openCheckpoint(model);
    expect(await endTokensOf({ ...checkpoint, directory }, undefined)).toEqual([1]);
    await writeFile(join(directory, 'generation_config.json'), '{"eos_token_id": [4, 5]}');
    expect(await endTokensOf({ ...checkpoint, directory }, undefined)).toEqual([4, 5]);
    expect(await endTokensOf({ ...checkpoint, config: {}, directory: model }, undefined)).toEqual([]);
  });

  it('an opened model can be used again and closes once', async () => {
    await using opened = await openModel(options());
    const first = await collect(generate(opened, inputs.slice(0, 2), { maxNewTokens: 3 }));
    const second = await collect(generate(opened, inputs.slice(0, 2), { maxNewTokens: 3 }));
    expect(second).toEqual(first);
  });
});

describe('ranks of one process', () => {
  const opening = (failing: number) => {
    const open = new Set<number>();
    const devices = openEach(4, (rank) => {
      if (rank === failing) throw new Error(`rank ${rank} has no device`);
      open.add(rank);
      return { rank, close: async () => void open.delete(rank) };
    });
    return { open, devices };
  };

  it.each([0, 1, 3])('that open all but rank %d leave no device behind', async (failing) => {
    const { open, devices } = opening(failing);
    await expect(devices).rejects.toThrow(`rank ${failing} has no device`);
    expect(open.size).toBe(0);
  });

  it('that all open have their devices in order, open', async () => {
    const { open, devices } = opening(-1);
    expect((await devices).map(({ rank }) => rank)).toEqual([0, 1, 2, 3]);
    expect(open.size).toBe(4);
  });
});
