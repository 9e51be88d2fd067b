/** Reward functions are held to their contract, and every breach names the sample. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { LockstepError } from '../../src/errors.js';
import { combineRewards } from '../../src/rewards/combine-rewards.js';
import { loadReward } from '../../src/rewards/load-reward.js';
import {
  type Reward,
  type RewardFunction,
  type RewardSample,
  scoreSamples,
} from '../../src/rewards/reward-function.js';
import { spreadRewards } from '../../src/rewards/spread-rewards.js';

const samples: RewardSample[] = ['one', 'two', 'three'].map((word, i) => ({
  prompt: `say ${word}`,
  response: word,
  tokens: Int32Array.from({ length: i + 1 }, (_, t) => t),
  row: { answer: word },
}));
const options = { timeoutSeconds: 5 };
const { signal } = new AbortController();

async function failure(promise: Promise<unknown>): Promise<LockstepError> {
  const error = await promise.then(
    () => undefined,
    (reason) => reason,
  );
  expect(LockstepError.isInstance(error), String(error)).toBe(true);
  return error as LockstepError;
}
const scoreWith = (reward: unknown, extra = {}) =>
  scoreSamples(reward as RewardFunction, samples, { ...options, ...extra });

describe('scoring samples', () => {
  it('passes prompt, response, tokens and row to a sync or async function, batch by batch', async () => {
    const sizes: number[] = [];
    const sync: RewardFunction = (batch) => {
      sizes.push(batch.length);
      return batch.map(({ response, row, tokens }) => (response === row.answer ? tokens.length : -1));
    };
    expect(await scoreWith(sync)).toEqual([1, 2, 3]);
    expect(await scoreWith(async (batch: RewardSample[]) => sync(batch, { signal }), { batchSize: 2 })).toEqual([
      1, 2, 3,
    ]);
    expect(sizes).toEqual([3, 2, 1]);
    expect(await scoreSamples(sync, [], options)).toEqual([]);
  });

  it('takes token rewards and step rewards', async () => {
    const rewards: Reward[] = [
      [0.5],
      {
        total: 7,
        steps: [
          { end: 1, reward: 1 },
          { end: 2, reward: 2 },
        ],
      },
      3,
    ];
    expect(await scoreWith(() => rewards)).toEqual(rewards);
  });

  it('names the sample for which a function throws, also inside a batch', async () => {
    const reward = (batch: RewardSample[]) =>
      batch.map(({ response }) => {
        if (response === 'two') throw new Error('no such word');
        return 1;
      });
    const error = await failure(scoreWith(reward));
    expect(error).toMatchObject({ code: 'REWARD_THREW', details: { sample: 1, prompt: 'say two' } });
    expect(error.message).toMatch(/sample 1 \(prompt "say two".*threw: no such word/);
    expect((await failure(scoreWith(async (b: RewardSample[]) => reward(b), { batchSize: 1 }))).details.sample).toBe(1);
  });

  it('names all samples of a batch that throws only as a whole', async () => {
    const error = await failure(
      scoreWith((batch: RewardSample[]) => {
        if (batch.length > 1) throw new Error('too many');
        return [1];
      }),
    );
    expect(error.message).toMatch(/samples 0 to 2 .*too many/);
  });

  it('refuses a wrong count', async () => {
    for (const returned of [[1, 2], [1, 2, 3, 4], undefined, 5]) {
      const error = await failure(scoreWith(() => returned));
      expect(error.code).toBe('REWARD_COUNT');
      expect(error.message).toMatch(/array of 3 rewards/);
    }
  });

  it('refuses numbers that are not finite, wherever they are', async () => {
    const bad: unknown[] = [Number.NaN, Infinity, [1, Number.NaN], { total: Number.NaN, steps: [] }];
    bad.push({ total: 1, steps: [{ end: 1, reward: -Infinity }] });
    for (const reward of bad) {
      const error = await failure(scoreWith(() => [1, reward, 1]));
      expect(error).toMatchObject({ code: 'REWARD_NOT_FINITE', details: { sample: 1 } });
      expect(error.message).toContain('say two');
    }
  });

  it('refuses other shapes', async () => {
    const step = (...ends: number[]) => ({ total: 0, steps: ends.map((end) => ({ end, reward: 0 })) });
    const bad: unknown[] = ['1', null, undefined, true, [1], [1, 2, 3], { total: 1 }, { steps: [] }, ['a', 'b']];
    bad.push(step(3), step(0), step(1, 1), step(1.5), { total: 1, steps: [null] });
    for (const reward of bad) {
      expect((await failure(scoreWith(() => [1, reward, 1]))).code, JSON.stringify(reward)).toBe('REWARD_SHAPE');
    }
  });

  it('ends the wait for a function that never answers and aborts its signal', async () => {
    let aborted = false;
    const hang: RewardFunction = (_, context) => {
      context.signal.addEventListener('abort', () => {
        aborted = true;
      });
      return new Promise(() => {});
    };
    const error = await failure(scoreWith(hang, { timeoutSeconds: 0.05 }));
    expect(error.code).toBe('REWARD_TIMEOUT');
    expect(error.message).toMatch(/samples 0 to 2.*say one.*0.05 s/);
    expect(aborted).toBe(true);
  });

  it('keeps the code of an error of this library, and names the sample for it', async () => {
    const reward = (batch: RewardSample[]) =>
      batch.map(({ response }) => {
        if (response === 'two') throw new LockstepError('REWARD_COLUMN', 'no column', { column: 'a' });
        return 1;
      });
    const error = await failure(scoreWith(reward, { name: 'The reward "x"' }));
    expect(error).toMatchObject({ code: 'REWARD_COLUMN', details: { sample: 1, column: 'a' } });
    expect(error.message).toMatch(/^The reward "x", on sample 1 .*failed: no column\.$/);
  });

  it('stops when the caller aborts', async () => {
    const controller = new AbortController();
    const hanging = scoreWith(() => new Promise(() => {}), { signal: controller.signal });
    controller.abort(new Error('stop'));
    await expect(hanging).rejects.toThrow('stop');
    await expect(scoreWith(() => [1, 2, 3], { signal: controller.signal })).rejects.toThrow('stop');
  });
});

describe('reward files', () => {
  const directory = mkdtempSync(join(tmpdir(), 'reward-'));
  afterAll(() => rmSync(directory, { recursive: true }));
  const file = (name: string, text: string) => {
    writeFileSync(join(directory, name), text);
    return join(directory, name);
  };
  const call = async (specifier: string) => (await loadReward(specifier))(samples, { signal });
  const one = 'samples.map(() => 1)';

  it('load in TypeScript and JavaScript, by default export, the name "reward", or the only function', async () => {
    const typed = file(
      'typed.ts',
      `type S = { response: string }[];\nexport default (s: S): number[] => s.map((x) => x.response.length);`,
    );
    expect(await call(typed)).toEqual([3, 3, 5]);
    const specifiers = [
      file('default.mjs', `export default (samples) => ${one};`),
      file('named.js', `export const helper = () => 0; export const reward = (samples) => ${one};`),
      file('only.ts', `export function judge(samples: unknown[]) { return ${one}; }`),
      file('common.cjs', `module.exports = (samples) => ${one};`),
      `${file('chosen.js', `export const a = () => 0; export const b = (samples) => ${one};`)}#b`,
    ];
    for (const specifier of specifiers) expect(await call(specifier), specifier).toEqual([1, 1, 1]);
  });

  it('that are missing, broken or without the function are errors that say so', async () => {
    expect((await failure(loadReward(join(directory, 'none.ts')))).code).toBe('REWARD_FILE_MISSING');
    const broken = await failure(loadReward(file('broken.ts', 'export default ((;')));
    expect(broken.code).toBe('REWARD_FILE_BROKEN');
    const two = file('two.ts', 'export const a = () => 0; export const b = () => 0;');
    const ambiguous = await failure(loadReward(two));
    expect(ambiguous.code).toBe('REWARD_EXPORT');
    expect(ambiguous.message).toMatch(/functions a, b/);
    expect((await failure(loadReward(`${two}#c`))).message).toContain('"c"');
    expect((await failure(loadReward(file('numbers.ts', 'export const x = 1;')))).message).toContain('no function');
  });
});

describe('spreading rewards over packed tokens', () => {
  it('keeps plain numbers per sequence', () => {
    expect(spreadRewards([1, 2], [4, 3], [2, 1])).toEqual({ scores: Float64Array.of(1, 2) });
  });

  it('puts token, step and plain rewards at the positions that predict their tokens', () => {
    const rewards: Reward[] = [
      [0.5, 1],
      {
        total: 9,
        steps: [
          { end: 1, reward: 3 },
          { end: 2, reward: 4 },
        ],
      },
      7,
    ];
    const { scores, tokens } = spreadRewards(rewards, [4, 3, 5], [2, 1, 2]);
    expect([...scores]).toEqual([1.5, 9, 7]);
    expect([...tokens!]).toEqual([0, 0.5, 1, 0, 3, 4, 0, 0, 0, 0, 7, 0]);
  });
});

describe('several terms', () => {
  const lengths = [4, 3, 2];
  // Position t predicts token t + 1; the second sequence has a gap at its end, the third no sampled token.
  const sampled = Uint8Array.of(0, 1, 1, 0, 1, 0, 0, 0, 0);

  it('add up by their weights', () => {
    const rewards = [{ scores: Float64Array.of(1, 2, 3) }, { scores: Float64Array.of(10, -20, 0) }];
    const terms = [
      { weight: 2, rewards: rewards[0]! },
      { weight: -0.5, rewards: rewards[1]! },
    ];
    expect(combineRewards(terms, lengths, sampled)).toEqual({ scores: Float64Array.of(-3, 14, 6) });
    expect(combineRewards([{ weight: 1, rewards: rewards[0]! }], lengths, sampled)).toEqual(rewards[0]);
  });

  it('add token by token, and a score goes to the last sampled position where others lie on tokens', () => {
    const dense = { scores: Float64Array.of(3, 5, 0), tokens: Float64Array.of(0, 1, 2, 0, 5, 0, 0, 0, 0) };
    const plain = { scores: Float64Array.of(10, 20, 30) };
    const steps = { scores: Float64Array.of(7, 0, 0), tokens: Float64Array.of(0, 0, 4, 0, 0, 0, 0, 0, 0) };
    const terms = [dense, plain, steps].map((rewards, i) => ({ weight: [1, 0.1, 2][i]!, rewards }));
    const { scores, tokens } = combineRewards(terms, lengths, sampled);
    expect([...scores]).toEqual([18, 7, 3]);
    expect([...tokens!]).toEqual([0, 1, 11, 0, 7, 0, 0, 0, 0]);
  });
});
