/** The rewards of a rollout, as a run computes them from its configuration: every kind of term that needs no model. */

import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import type { Rollout } from '../../src/algorithms/algorithm.js';
import { loadTokenizer, type Tokenizer } from '../../src/data/tokenizer.js';
import { Closing } from '../../src/train/closing.js';
import { Recorder } from '../../src/train/recorder.js';
import { rewardSchema } from '../../src/train/reward-schema.js';
import { openJudge } from '../../src/train/rewards.js';

const directory = mkdtempSync(join(tmpdir(), 'reward-source-'));
const closing = new Closing();
let tokenizer: Tokenizer;
let rollout: Rollout;

const responses = ['{"answer": 1}', 'It is \\boxed{\\frac{1}{2}}', '5'];

beforeAll(async () => {
  tokenizer = await loadTokenizer('test/fixtures/models/llama');
  const encode = (text: string) => Int32Array.from(tokenizer.encode(text, { special: false }));
  const prompts = ['a', 'b', 'c'].map((text, i) => ({
    tokens: encode(text),
    row: { answer: ['no', '0.5', 5][i], exact: responses[i] },
  }));
  const sequences = prompts.map(({ tokens }, i) => Int32Array.of(...tokens, ...encode(responses[i]!)));
  const promptLengths = Int32Array.from(prompts, ({ tokens }) => tokens.length);
  rollout = {
    prompts,
    promptLengths,
    tokens: Int32Array.from(sequences.flatMap((sequence) => [...sequence])),
    lengths: Int32Array.from(sequences, ({ length }) => length),
    responseMask: Uint8Array.from(
      sequences.flatMap((sequence, row) =>
        Array.from(sequence, (_, t) => Number(t >= promptLengths[row]! - 1 && t < sequence.length - 1)),
      ),
    ),
    finish: ['stop', 'stop', 'stop'],
  } as unknown as Rollout;
});

afterAll(async () => {
  await closing.close();
  rmSync(directory, { recursive: true });
});

const open = async (reward: unknown, given: Tokenizer | undefined = tokenizer) => ({
  computeRewards: await openJudge(rewardSchema.parse(reward), 'reward', undefined, {
    recorder: new Recorder(),
    tokenizer: given,
    own: (resource) => closing.own(resource),
  }),
});

const file = (name: string, text: string) => {
  writeFileSync(join(directory, name), text);
  return join(directory, name);
};

it('every kind of term scores the decoded texts, and the sum is weighted', async () => {
  const server = createServer((request, response) => {
    request.resume().on('end', () => response.end(JSON.stringify({ rewards: [1, 2, 3] })));
  });
  await new Promise<void>((done) => server.listen(0, '127.0.0.1', done));
  const terms = [
    { exact: { column: 'exact' }, weight: 1 },
    { boxed: { column: 'answer' }, weight: 10 },
    { regex: { pattern: '^\\d$' }, weight: 100 },
    { jsonSchema: { schema: { required: ['answer'], type: 'object' } }, weight: 1000 },
    { jsonSchema: { file: file('s.json', '{"type": "number"}') }, weight: 1e4, name: 'number' },
    { function: file('f.mjs', 'export default (s) => s.map((x) => x.response.length);'), weight: 0, threads: 2 },
    { repetition: { ngram: 100 }, weight: 0 },
    { length: { max: 1000, buffer: 1 }, weight: 0 },
    { http: { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/` }, weight: 1e5 },
  ];
  const { scores, tokens, terms: parts } = await (await open(terms)).computeRewards(rollout);
  server.closeAllConnections();
  server.close();
  expect(tokens).toBeUndefined();
  expect([...scores]).toEqual([101001, 200011, 310101]);
  expect(Object.fromEntries(Object.entries(parts!).map(([name, part]) => [name, [...part]]))).toEqual({
    exact: [1, 1, 1],
    boxed: [0, 1, 0],
    regex: [0, 0, 1],
    jsonSchema: [1, 0, 0],
    number: [0, 0, 1],
    function: responses.map(({ length }) => length),
    repetition: [0, 0, 0],
    length: [0, 0, 0],
    http: [1, 2, 3],
  });
});

it('one term has no parts; its weight counts', async () => {
  const { scores, terms } = await (await open({ exact: { column: 'answer' }, weight: -2 })).computeRewards(rollout);
  expect([...scores]).toEqual([0, 0, -2]);
  expect(terms).toBeUndefined();
});

it('a function asked about two rollouts at once answers one after the other', async () => {
  const calls = `
    let busy = false;
    export default async (samples) => {
      if (busy) throw new Error('two calls at once');
      busy = true;
      await new Promise((done) => setTimeout(done, 50));
      busy = false;
      return samples.map(({ response }) => response.length);
    };`;
  const source = await open({ function: file('sleeps.mjs', calls) });
  const last = rollout.lengths.reduce((sum, length, i) => (i < 2 ? sum + length : sum), 0);
  const other = {
    ...rollout,
    prompts: rollout.prompts.slice(2),
    promptLengths: rollout.promptLengths.slice(2),
    tokens: rollout.tokens.slice(last),
    lengths: rollout.lengths.slice(2),
    responseMask: rollout.responseMask.slice(last),
    finish: ['stop'],
  } as unknown as Rollout;
  const both = await Promise.all([source.computeRewards(rollout), source.computeRewards(other)]);
  expect(both.map(({ scores }) => [...scores])).toEqual([responses.map(({ length }) => length), [1]]);
});

it('a row without the answer stops the run, with the term, the sample and the column named', async () => {
  const source = await open([{ numeric: { column: 'answer' }, name: 'sum' }, { repetition: {} }]);
  await expect(source.computeRewards(rollout)).rejects.toThrow(
    /The reward "sum", on sample 0 .*no number in column "answer": "no"/,
  );
});

it('a regular expression that would never end is ended', async () => {
  const source = await open({ regex: { pattern: '^(\\w|\\w\\w)*!$' }, timeoutSeconds: 0.3 });
  const sample = `${'a'.repeat(60)}`;
  const ids = Int32Array.from(tokenizer.encode(sample, { special: false }));
  const long = {
    prompts: [{ tokens: Int32Array.of(5), row: {} }],
    promptLengths: Int32Array.of(1),
    tokens: Int32Array.of(5, ...ids),
    lengths: Int32Array.of(1 + ids.length),
    responseMask: new Uint8Array(1 + ids.length).fill(1, 0, ids.length),
    finish: ['stop'],
  } as unknown as Rollout;
  await expect(source.computeRewards(long)).rejects.toMatchObject({ code: 'REWARD_TIMEOUT' });
});

it('a schema of a file is read, and wrong ones refused, before anything is scored', async () => {
  await expect(open({ jsonSchema: { file: join(directory, 'absent.json') } })).rejects.toThrow(
    /cannot read the JSON schema/,
  );
  await expect(open({ jsonSchema: { file: file('bad.json', '{') } })).rejects.toMatchObject({
    code: 'REWARD_SETTINGS',
  });
  const wrong = file('wrong.json', '{"type": "strin"}');
  await expect(open({ jsonSchema: { file: wrong } })).rejects.toThrow(/wrong at #\/type/);
});
