/** The `reward` key: one list of terms from every form, and messages that name the key. */
import { describe, expect, it } from 'vitest';
import { LockstepError } from '../../src/errors.js';
import { configJsonSchema, defineConfig, parseConfig, printConfig } from '../../src/train/config.js';
import { type RewardTerm, rewardIdentity, rewardKinds } from '../../src/train/reward-schema.js';

const config = (reward: unknown) => ({ algorithm: 'ppo', model: 'm', data: { train: 'd.jsonl' }, reward });
const parsed = (reward: unknown): RewardTerm[] => (parseConfig(config(reward)) as { reward: RewardTerm[] }).reward;

function failure(reward: unknown): LockstepError {
  try {
    parsed(reward);
  } catch (error) {
    expect(LockstepError.isInstance(error), String(error)).toBe(true);
    return error as LockstepError;
  }
  throw new Error('the configuration was accepted');
}

const threaded = { threads: 1, timeoutSeconds: 60 };
/** A term of each kind: as written, and with its defaults. */
const terms: [unknown, Record<string, unknown>][] = [
  [{ model: 'm' }, { model: 'm' }],
  [{ function: './r.ts' }, { function: './r.ts', ...threaded }],
  [{ exact: { column: 'a' } }, { exact: { column: 'a', ignoreCase: false } }],
  [{ numeric: { column: 'a' } }, { numeric: { column: 'a', tolerance: 1e-6 } }],
  [{ boxed: { column: 'a' } }, { boxed: { column: 'a' } }],
  [{ regex: { pattern: 'x' } }, { regex: { pattern: 'x', flags: '' }, ...threaded }],
  [{ jsonSchema: { file: 's.json' } }, { jsonSchema: { file: 's.json', extract: 'whole' }, ...threaded }],
  [{ length: { target: 50 } }, { length: { target: 50, width: 50 } }],
  [
    { cosine: { max: 64, answer: { boxed: { column: 'a' } } } },
    { cosine: { max: 64, correct: [1, 0.5], wrong: [-1, -0.5], answer: { boxed: { column: 'a' } } } },
  ],
  [{ repetition: {} }, { repetition: { ngram: 3 } }],
  [
    { http: { url: 'http://h/r' } },
    {
      http: {
        url: 'http://h/r',
        headers: {},
        batchSize: 16,
        concurrency: 4,
        timeoutSeconds: 60,
        retries: 3,
        backoffSeconds: 0.5,
      },
    },
  ],
];

describe('terms', () => {
  it.each(terms)('%j has defaults, alone or in a list', (written, full) => {
    const expected = { ...full, name: Object.keys(full)[0], weight: 1 };
    expect(parsed(written)).toEqual([expected]);
    expect(parsed([written])).toEqual([expected]);
  });

  it('cover every kind, and all together parse and print to themselves', () => {
    expect(terms.map(([, full]) => Object.keys(full)[0])).toEqual(rewardKinds);
    const complete = parseConfig(config(terms.map(([written]) => written)));
    expect(parseConfig(complete)).toEqual(complete);
    expect(printConfig(complete)).toContain('http://h/r');
  });

  it('of the short form are a model and a function', () => {
    expect(parsed({ model: 'm', function: './r.ts', timeoutSeconds: 5 })).toEqual([
      { model: 'm', name: 'model', weight: 1 },
      { function: './r.ts', name: 'function', weight: 1, threads: 1, timeoutSeconds: 5 },
    ]);
    expect(parsed({ function: './r.ts', threads: 3, batchSize: 8, weight: -0.5, name: 'mine' })).toEqual([
      { function: './r.ts', name: 'mine', weight: -0.5, threads: 3, batchSize: 8, timeoutSeconds: 60 },
    ]);
  });

  it('are typed', () => {
    const common = { algorithm: 'ppo', model: 'm', data: { train: 'd' } } as const;
    const listed = defineConfig({
      ...common,
      reward: [{ exact: { column: 'a' }, weight: 2 }, { length: { max: 9, buffer: 3 } }],
    });
    expect(parseConfig(listed)).toMatchObject({ reward: [{ weight: 2 }, { length: { max: 9, buffer: 3 } }] });
    // @ts-expect-error a column is needed
    expect(() => parseConfig(defineConfig({ ...common, reward: [{ exact: {} }] }))).toThrow('reward.0.exact.column');
  });

  it('are in the JSON Schema for editors', () => {
    const text = JSON.stringify(configJsonSchema());
    for (const kind of rewardKinds) expect(text).toContain(`"${kind}":`);
  });
});

describe('unknown keys', () => {
  it.each<[unknown, string]>([
    [{ modell: 'm' }, 'reward.modell: unknown key; did you mean reward.model?'],
    [{ timeout: 3, function: 'f' }, 'reward.timeout: unknown key; did you mean reward.timeoutSeconds?'],
    [[{ exakt: { column: 'a' } }], 'reward.0.exakt: unknown key; did you mean reward.0.exact?'],
    [
      [{ model: 'm' }, { exact: { colum: 'a' } }],
      'reward.1.exact.colum: unknown key; did you mean reward.1.exact.column?',
    ],
    [[{ model: 'm', wieght: 2 }], 'reward.0.wieght: unknown key; did you mean reward.0.weight?'],
    [[{ model: 'm', threads: 2 }], 'reward.0.threads: unknown key; it goes with function, regex, jsonSchema'],
    [{ model: 'm', threads: 2 }, 'reward.threads: unknown key; it goes with function, regex, jsonSchema'],
    [{ weight: 2 }, 'reward.weight: unknown key; it goes with model, function, exact'],
    [[{ length: { target: 5, buffer: 3 } }], 'reward.0.length.buffer: unknown key; it goes with max, buffer'],
    [
      [{ jsonSchema: { schem: {} } }],
      'reward.0.jsonSchema.schem: unknown key; did you mean reward.0.jsonSchema.schema?',
    ],
    [
      [{ http: { url: 'http://h', retry: 1 } }],
      'reward.0.http.retry: unknown key; did you mean reward.0.http.retries?',
    ],
  ])('%j', (reward, message) => {
    const error = failure(reward);
    expect(error.code).toBe('CONFIG_UNKNOWN_KEY');
    expect(error.message).toContain(message);
  });
});

describe('wrong values', () => {
  it.each<[unknown, string]>([
    ['./r.ts', 'reward: expected an object or a list, received "./r.ts"'],
    [['./r.ts'], 'reward.0: expected an object, received "./r.ts"'],
    [[{}], 'reward.0: expected one of the keys model, function, exact, numeric, boxed, regex, jsonSchema, length'],
    [[{ weight: 2 }], 'reward.0: expected one of the keys model, function, exact'],
    [[{ exact: { column: 'a' }, boxed: { column: 'a' } }], 'reward.0: expected only one of the keys boxed, exact'],
    [[{ model: 'm', function: 'f' }], 'reward.0: expected only one of the keys function, model'],
    [[{ model: 'm', weight: Number.NaN }], 'reward.0.weight: expected a number, received NaN'],
    [[{ model: 'm', weight: Number.POSITIVE_INFINITY }], 'reward.0.weight: expected a number, received Infinity'],
    [[{ model: '' }], 'reward.0.model: expected a text that is not empty, received ""'],
    [
      [{ model: 'm', name: 'a b' }],
      'reward.0.name: expected a letter followed by letters, digits, - or _, received "a b"',
    ],
    [[{ function: 'f', threads: 0 }], 'reward.0.threads: expected a number > 0, received 0'],
    [[{ exact: {} }], 'reward.0.exact.column: expected a string, received nothing'],
    [[{ numeric: { column: 'a', tolerance: -1 } }], 'reward.0.numeric.tolerance: expected a number >= 0, received -1'],
    [
      [{ regex: { pattern: '(' } }],
      'reward.0.regex.pattern: expected one that can be used: Invalid regular expression: /(/',
    ],
    [
      [{ regex: { pattern: 'a', flags: 'g' } }],
      'reward.0.regex.pattern: expected one that can be used: flags "g" are not of i',
    ],
    [
      [{ jsonSchema: { schema: { type: 'strin' } } }],
      'reward.0.jsonSchema.schema: expected one that can be used: the JSON schema is wrong at #/type',
    ],
    [[{ jsonSchema: { schema: 5 } }], 'reward.0.jsonSchema.schema: expected'],
    [[{ length: { max: 10 } }], 'reward.0.length.buffer: expected a number, received nothing'],
    [[{ length: { max: 10, buffer: 20 } }], 'reward.0.length.buffer: expected at most max, received 20'],
    [
      [{ http: { url: 'nowhere' } }],
      'reward.0.http.url: expected one that can be used: Invalid URL, received "nowhere"',
    ],
    [
      [{ http: { url: 'ftp://h/r' } }],
      'reward.0.http.url: expected one that can be used: ftp: is neither http: nor https:',
    ],
    [[{ http: { url: 'http://u:p@h/r' } }], 'credentials belong in headers'],
    [[{ http: { url: 'http://h', headers: { a: 1 } } }], 'reward.0.http.headers.a: expected a string, received 1'],
  ])('%j', (reward, message) => {
    const error = failure(reward);
    expect(error.code).toBe('CONFIG_INVALID');
    expect(error.message).toContain(message);
  });
});

describe('contradictions', () => {
  const exact = { exact: { column: 'a' } };
  it.each<[unknown, string]>([
    [[], 'reward: ppo needs a reward; set reward.model, reward.function, or a list of terms'],
    [{}, 'reward: ppo needs a reward'],
    [[{ model: 'a' }, exact, { model: 'b', name: 'other' }], 'reward.2.model: a run has at most one reward model'],
    [[exact, exact], 'reward.1.name: two terms have the name exact'],
    [[exact, { boxed: { column: 'a' }, name: 'exact' }], 'reward.1.name: two terms have the name exact'],
    [[{ ...exact, name: 'mean' }], 'reward.0.name: reward.mean is a metric of the whole reward'],
    [[{ ...exact, weight: 0 }], 'reward: all weights are 0'],
  ])('%j', (reward, message) => {
    const error = failure(reward);
    expect(error.code).toBe('CONFIG_CONTRADICTION');
    expect(error.message).toContain(message);
  });

  it('a term that is only measured is none', () => {
    expect(parsed([exact, { repetition: {}, weight: 0 }])).toHaveLength(2);
  });
});

describe('the identity of a reward, by which a run may go on', () => {
  it('is the same for forms of one reward, and for settings that change no reward', () => {
    const short = rewardIdentity({ model: 'm', function: './r.ts', timeoutSeconds: 5 });
    expect(short).toEqual(rewardIdentity([{ model: './m' }, { function: 'r.ts', name: 'f' }]));
    const batched = (threads: number) => rewardIdentity({ function: 'r.ts', batchSize: 2, threads, weight: 1 });
    expect(batched(4)).toEqual(batched(1));
    const regex = { pattern: 'x' };
    expect(rewardIdentity([{ regex, threads: 4, batchSize: 2 }])).toEqual(rewardIdentity([{ regex }]));
    const http = (changes: object) => rewardIdentity([{ http: { url: 'http://h/r', ...changes } }]);
    expect(http({ retries: 9, headers: { a: 'b' } })).toEqual(http({}));
  });

  it('differs by weight, column, file, endpoint, and what a function is called with', () => {
    const numeric = { numeric: { column: 'a' } };
    const all = [
      numeric,
      { ...numeric, weight: 2 },
      { numeric: { column: 'b' } },
      { jsonSchema: { file: 'a.json' } },
      { jsonSchema: { file: 'b.json' } },
      { http: { url: 'http://h/r' } },
      { http: { url: 'http://h/s' } },
      { function: 'r.ts' },
      { function: 'r.ts', threads: 2 },
      { function: 'r.ts', batchSize: 2 },
      [numeric, { repetition: {} }],
    ].map((reward) => JSON.stringify(rewardIdentity(reward)));
    expect(new Set(all).size).toBe(all.length);
  });
});
