/** Reward functions in worker threads: the rewards of any number of threads are the same, and no failure is silent. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { LockstepError } from '../../src/errors.js';
import type { RewardSample } from '../../src/rewards/reward-function.js';
import type { ThreadSource } from '../../src/rewards/thread.js';
import { openRewardThreads, type RewardThreadsOptions, type Scorer } from '../../src/train/reward-threads.js';

const samples: RewardSample[] = Array.from({ length: 7 }, (_, i) => ({
  prompt: `say ${i}`,
  response: 'x'.repeat(i),
  tokens: Int32Array.from({ length: i + 1 }, (_, t) => 10 * i + t),
  row: { answer: i },
}));
const { signal } = new AbortController();
const directory = mkdtempSync(join(tmpdir(), 'reward-threads-'));
afterAll(() => rmSync(directory, { recursive: true }));

function file(name: string, body: string): string {
  const path = join(directory, name);
  writeFileSync(path, `export default ${body};`);
  return path;
}

/** Runs `use` with an open function, and closes it. */
async function withThreads<T>(
  source: ThreadSource | string,
  options: Partial<RewardThreadsOptions>,
  use: (scorer: Scorer) => Promise<T>,
): Promise<T> {
  const from = typeof source === 'string' ? { file: source } : source;
  const name = typeof source === 'string' ? `The reward function of ${source}` : 'The reward';
  const scorer = await openRewardThreads(from, { name, threads: 2, timeoutSeconds: 20, ...options });
  try {
    return await use(scorer);
  } finally {
    await scorer.close();
  }
}

const scores = (source: ThreadSource | string, options: Partial<RewardThreadsOptions>) =>
  withThreads(source, options, (scorer) => scorer.score(samples, signal));

async function failure(promise: Promise<unknown>): Promise<LockstepError> {
  const error = await promise.then(
    () => undefined,
    (reason) => reason,
  );
  expect(LockstepError.isInstance(error), String(error)).toBe(true);
  return error as LockstepError;
}

describe('any number of threads', () => {
  // A function may look at the other samples of its call: with batchSize the calls are the same, too.
  const source = file(
    'whole.ts',
    '(s: { tokens: Int32Array; row: { answer: number } }[]) => s.map((x) => x.tokens[0] + x.row.answer + 1000 * s.length)',
  );

  it('gives the same rewards, in the order of samples', async () => {
    const expected = samples.map((_, i) => 11 * i + 1000 * [2, 2, 2, 2, 2, 2, 1][i]!);
    for (const threads of [1, 2, 5]) {
      expect(await scores(source, { threads, batchSize: 2 }), `${threads} threads`).toEqual(expected);
    }
  });

  it('shares all samples equally when no batch size is given', async () => {
    const sizes = async (threads: number) =>
      (await scores(source, { threads })).map((reward) => Math.floor((reward as number) / 1000));
    expect(await sizes(1)).toEqual([7, 7, 7, 7, 7, 7, 7]);
    expect(await sizes(3)).toEqual([3, 3, 3, 3, 3, 3, 1]);
  });

  it('carries token and step rewards, and calls again', async () => {
    const shaped = file(
      'shaped.mjs',
      `(s) => s.map(({ tokens, row }) => row.answer % 2 ? Array.from(tokens) : { total: 1, steps: [{ end: 1, reward: 2 }] })`,
    );
    await withThreads(shaped, { batchSize: 3 }, async (scorer) => {
      const first = await scorer.score(samples, signal);
      expect(first[1]).toEqual([10, 11]);
      expect(first[6]).toEqual({ total: 1, steps: [{ end: 1, reward: 2 }] });
      expect(await scorer.score(samples, signal)).toEqual(first);
      expect(await scorer.score([], signal)).toEqual([]);
      expect(await scorer.score(samples.slice(0, 1), signal)).toEqual(first.slice(0, 1));
    });
  });

  it('runs built-in rewards', async () => {
    const builtIn = ['regex', { pattern: '^x{3,}$', flags: '' }] as const;
    expect(await scores({ builtIn }, {})).toEqual([0, 0, 0, 1, 1, 1, 1]);
  });
});

describe('a failure names file, thread and sample', () => {
  const at = (when: string, then: string) => `(s) => s.map(({ row }) => { if (${when}) { ${then} } return 1; })`;

  it('of a function that throws', async () => {
    const path = file('throws.mjs', at('row.answer === 5', "throw new Error('no idea')"));
    const error = await failure(scores(path, {}));
    expect(error).toMatchObject({ code: 'REWARD_THREW', details: { sample: 5, prompt: 'say 5' } });
    expect(error.message).toContain(`${path} (thread 2 of 2), on sample 5 `);
    expect(error.message).toContain('threw: no idea');
  });

  it('of one thread, while another would run for ever', async () => {
    const path = file('one-throws.mjs', '(s) => { for (;;) if (s[0].row.answer === 4) throw new Error("no"); }');
    expect((await failure(scores(path, { timeoutSeconds: 1000 }))).details.sample).toBe(4);
  });

  it('of a reward that is no finite number', async () => {
    const path = file('nan.mjs', at('row.answer === 2', 'return NaN'));
    expect(await failure(scores(path, {}))).toMatchObject({ code: 'REWARD_NOT_FINITE', details: { sample: 2 } });
    const functions = file('function.mjs', at('row.answer === 2', 'return () => 1'));
    expect(await failure(scores(functions, {}))).toMatchObject({ code: 'REWARD_SHAPE', details: { sample: 2 } });
  });

  it.each([
    ['blocks', 'for (;;);'],
    ['never answers', 'return new Promise(() => {});'],
  ])('of a function that %s: the time-out ends its thread', async (name, body) => {
    const path = file(`${name}.mjs`, `(s) => { if (s[0].row.answer === 4) { ${body} } return s.map(() => 1); }`);
    await withThreads(path, { batchSize: 1, timeoutSeconds: 1 }, async (scorer) => {
      const error = await failure(scorer.score(samples, signal));
      expect(error).toMatchObject({ code: 'REWARD_TIMEOUT', details: { sample: 4, timeoutSeconds: 1 } });
      expect(error.message).toContain(`${path} (thread 2 of 2), on sample 4 `);
      expect(await failure(scorer.score(samples, signal))).toMatchObject({ code: 'REWARD_THREAD' });
    });
  });

  it('of a thread that dies', async () => {
    const path = file('dies.mjs', at('row.answer === 6', 'process.exit(3)'));
    const error = await failure(scores(path, { batchSize: 1 }));
    expect(error).toMatchObject({ code: 'REWARD_THREAD', details: { sample: 6 } });
    expect(error.message).toContain(`${path} (thread 2 of 2), on sample 6 `);
    expect(error.message).toContain('it exited with code 3');
  });

  it('of a thread that fails outside of the call', async () => {
    const path = file('later.mjs', "() => new Promise(() => { setTimeout(() => { throw new Error('too late'); }) })");
    expect((await failure(scores(path, {}))).message).toContain('it failed: too late');
  });

  it('of a file that does not load in its threads', async () => {
    const path = file('broken.mjs', '((');
    expect((await failure(scores(path, {}))).code).toBe('REWARD_FILE_BROKEN');
    expect((await failure(scores(join(directory, 'absent.ts'), {}))).code).toBe('REWARD_FILE_MISSING');
    const exits = join(directory, 'exits.mjs');
    writeFileSync(exits, 'process.exit(1);');
    expect((await failure(scores(exits, {}))).message).toMatch(/could not be loaded: it exited with code 1/);
  });
});

describe('a file that does not end to load', () => {
  it.each([
    ['blocks', 'for (;;);'],
    ['waits', 'await new Promise((resolve) => setTimeout(resolve, 1e6));'],
  ])('as it %s, is ended by the time-out, and by the signal', async (name, body) => {
    const path = join(directory, `load-${name}.mjs`);
    writeFileSync(path, `${body}\nexport default () => [];`);
    const error = await failure(scores(path, { timeoutSeconds: 0.5 }));
    expect(error).toMatchObject({ code: 'REWARD_TIMEOUT', details: { timeoutSeconds: 0.5 } });
    expect(error.message).toMatch(/\(thread 1 of 2\) was not ready within 0.5 s while loading/);
    const controller = new AbortController();
    const loading = scores(path, { timeoutSeconds: 1000, signal: controller.signal });
    setTimeout(() => controller.abort(new Error('stop')), 500);
    await expect(loading).rejects.toThrow('stop');
    await expect(scores(path, { signal: controller.signal })).rejects.toThrow('stop');
  });
});

it('an abort ends the threads', async () => {
  const path = file('hangs.mjs', '() => { for (;;); }');
  const controller = new AbortController();
  await withThreads(path, {}, async (scorer) => {
    const scoring = scorer.score(samples, controller.signal);
    controller.abort(new Error('stop'));
    await expect(scoring).rejects.toThrow('stop');
    await expect(scorer.score(samples, signal)).rejects.toMatchObject({ code: 'REWARD_THREAD' });
  });
});
