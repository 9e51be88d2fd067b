/** The built-in rewards against published values and answers that must, or must not, count as equal. */
import { describe, expect, it } from 'vitest';
import { lastBoxed } from '../../src/rewards/built-in/boxed.js';
import { sameMath } from '../../src/rewards/built-in/math-text.js';
import { mathValue } from '../../src/rewards/built-in/math-value.js';
import { numbersIn } from '../../src/rewards/built-in/numbers.js';
import { answerOf } from '../../src/rewards/built-in/numeric.js';
import { rewardFunctions } from '../../src/rewards/built-in/registry.js';
import {
  type Reward,
  type RewardFunction,
  type RewardSample,
  scoreSamples,
} from '../../src/rewards/reward-function.js';

const sample = (response: string, row: Record<string, unknown> = {}, tokens = [1, 2, 3]): RewardSample => ({
  prompt: 'question',
  response,
  tokens: Int32Array.from(tokens),
  row,
});

const scored = async (reward: RewardFunction, ...samples: RewardSample[]): Promise<Reward[]> =>
  scoreSamples(reward, samples, { timeoutSeconds: 5, name: 'The reward "x"' });

describe('exact', () => {
  it('compares text without the space around it', async () => {
    const reward = rewardFunctions.exact({ column: 'answer', ignoreCase: false });
    const row = { answer: 'Paris' };
    expect(await scored(reward, sample(' Paris\n', row), sample('paris', row), sample('Paris.', row))).toEqual([
      1, 0, 0,
    ]);
    expect(await scored(reward, sample('7', { answer: 7 }), sample('7', { answer: 7n }))).toEqual([1, 1]);
    const ignoring = rewardFunctions.exact({ column: 'answer', ignoreCase: true });
    expect(await scored(ignoring, sample('paris', row))).toEqual([1]);
  });
});

describe('a row without the right answer', () => {
  it.each([
    [{ question: 'x' }, /has no column "answer"; its columns are question/],
    [{ answer: null }, /holds null in column "answer"/],
    [{ answer: ['a'] }, /holds a list in column "answer"/],
    [{ answer: Number.NaN }, /holds a value of type number/],
    [Object.create({ answer: 'inherited' }) as Record<string, unknown>, /has no column "answer"; its columns are none/],
  ])('is an error that names sample and column, never 0: %j', async (row, message) => {
    for (const name of ['exact', 'numeric', 'boxed'] as const) {
      const reward = rewardFunctions[name]({ column: 'answer', ignoreCase: false, tolerance: 0 });
      const scoring = scored(reward, sample('\\boxed{1}', { answer: '1' }), sample('\\boxed{1}', row));
      await expect(scoring, name).rejects.toMatchObject({
        code: 'REWARD_COLUMN',
        details: { sample: 1, column: 'answer' },
      });
      await expect(scoring, name).rejects.toThrow(/The reward "x", on sample 1 /);
      await expect(scoring, name).rejects.toThrow(message);
    }
  });

  it('also when the answer should be a number', async () => {
    const reward = rewardFunctions.numeric({ column: 'answer', tolerance: 0 });
    await expect(scored(reward, sample('5', { answer: 'five' }))).rejects.toThrow(
      /no number in column "answer": "five"/,
    );
  });
});

describe('numbers in text', () => {
  it.each<[string, number[][]]>([
    ['1,234.50 and 12,34', [[1234.5], [12], [34]]],
    ['-5, − 5, −5, +5, 10-3, (2)-1', [[-5], [5], [-5], [5], [10], [3], [2], [1]]],
    ['.5 5. 3/4 7 / 2', [[0.5], [5], [0.75], [3.5]]],
    [
      '20% 12.5\\%',
      [
        [20, 0.2],
        [12.5, 0.125],
      ],
    ],
    ['1e-3 2.5E+2 3 × 10^5 2*10^{-2} 4e', [[1e-3], [250], [3e5], [0.02], [4]]],
    ['$1,000,000 costs 3kg of GPT4 and H2O, x_1', [[1e6], [3]]],
    ['1/0', []],
    ['none', []],
    ['1,2,3', [[1], [2], [3]]],
  ])('%s', (text, expected) => {
    expect(numbersIn(text)).toEqual(expected);
  });
});

describe('numeric', () => {
  it('reads the answer behind ####, else the last number', () => {
    expect(answerOf('9 eggs at $2: 9 * 2 = <<9*2=18>>18\n#### 18')).toEqual([18]);
    expect(answerOf('so 12.\n#### -1,005 dollars\nHuman: 3')).toEqual([-1005]);
    expect(answerOf('first #### 4 then #### 5, not 6')).toEqual([5]);
    expect(answerOf('8 in all\n#### ?')).toEqual([8]);
    expect(answerOf('It is 3 or 4')).toEqual([4]);
    expect(answerOf('unknown')).toBeUndefined();
  });

  it('compares values, relative to large ones', async () => {
    const reward = rewardFunctions.numeric({ column: 'answer', tolerance: 1e-6 });
    const pairs: [string, unknown, number][] = [
      ['is 0.5', '1/2', 1],
      ['is 20%', '0.2', 1],
      ['is 20%', 20, 1],
      ['is 0.2', 20, 0],
      ['1000000.5', '#### 1,000,000', 1],
      ['1000002', 1e6, 0],
      ['1e21', 1e21, 1],
      [`1${'0'.repeat(24)}`, 1e24, 1],
      ['0.0000001', 0, 1],
      ['no idea', 0, 0],
      ['', 0, 0],
    ];
    for (const [response, answer, expected] of pairs) {
      expect(await scored(reward, sample(response, { answer })), `${response} = ${answer}`).toEqual([expected]);
    }
    const strict = rewardFunctions.numeric({ column: 'answer', tolerance: 0 });
    expect(await scored(strict, sample('1e-3', { answer: 0.001 }), sample('0.1000001', { answer: 0.1 }))).toEqual([
      1, 0,
    ]);
  });
});

describe('boxed', () => {
  it('takes the last box that is closed, with its inner braces', () => {
    expect(lastBoxed('\\boxed{1} so \\boxed{\\frac{1}{\\sqrt{2}}}.')).toBe('\\frac{1}{\\sqrt{2}}');
    expect(lastBoxed('\\boxed{1} or \\boxed{2')).toBe('1');
    expect(lastBoxed('\\boxed {\\{1, 2\\}}')).toBe('\\{1, 2\\}');
    expect(lastBoxed('\\boxed{}')).toBe('');
    expect(lastBoxed('\\boxed 5, boxed{5}')).toBeUndefined();
    expect(lastBoxed('')).toBeUndefined();
  });

  it.each([
    ['\\frac{1}{2}', '\\dfrac12'],
    ['\\tfrac{1}{2}', '0.50'],
    ['1/2', '.5'],
    ['-\\frac{3}{4}', '-0.75'],
    ['50\\%', '\\frac{1}{2}'],
    ['50\\%', '50'],
    ['1,234', '1234'],
    ['10{,}000', '10000'],
    ['+7', '7.0'],
    ['7.', '7'],
    ['$18.90', '18.9'],
    ['90^\\circ', '90'],
    ['90^{\\circ}', '90°'],
    ['5\\text{ cm}', '5'],
    ['5\\text{ cm}^2', '5'],
    ['\\text{Yes}', 'Yes'],
    ['\\text{June 20}', 'June20'],
    ['x = 5', '5'],
    ['x \\in [0, 1)', '[0,1)'],
    ['\\left( 1, \\frac{1}{2} \\right)', '(1,0.5)'],
    ['\\{ 1, 2 \\}', '\\{1, 2.0\\}'],
    ['1, 2, 3', '1,2,3.0'],
    ['3 \\text{ and } 5', '3, 5'],
    ['2\\sqrt3', '\\sqrt{12}'],
    ['\\sqrt[3]{8}', '2'],
    ['\\frac{\\sqrt{2}}{2}', '\\frac{1}{\\sqrt{2}}'],
    ['1\\frac{1}{2}', '1.5'],
    ['2^{10}', '1024'],
    ['3 \\cdot 10^5', '300000'],
    ['\\frac{\\pi}{2}', '0.5\\pi'],
    ['2\\pi r', '2 \\pi r'],
    ['0.50x', '.5x'],
    ['a/b', '\\frac{a}{b}'],
    ['(-\\infty, 2]', '(-\\infty,2.0]'],
    ['−3', '-3'],
  ])('%s equals %s', (a, b) => {
    expect(sameMath(a, b)).toBe(true);
    expect(sameMath(b, a)).toBe(true);
  });

  it.each([
    ['1', '2'],
    ['\\frac{1}{3}', '0.333'],
    ['0.5', '50'],
    ['(1,2)', '[1,2]'],
    ['(1,2)', '(2,1)'],
    ['(1,2)', '(1,2,3)'],
    ['(1,2)', '12'],
    ['\\{1\\}', '1'],
    ['1,234', '(1,234)'],
    ['1, 234', '1234'],
    ['3 \\text{ or } 5', '35'],
    ['x+1', '1+x'],
    ['Yes', 'yes'],
    ['-5', '5'],
    ['2^{-1}', '2'],
    ['12', '1\\frac{2}{1}1'],
    ['', '0'],
    ['\\sqrt{-1}', '0'],
    ['1/0', '2/0'],
  ])('%s is not %s', (a, b) => {
    expect(sameMath(a, b)).toBe(false);
    expect(sameMath(b, a)).toBe(false);
  });

  it('evaluates numbers only', () => {
    expect(mathValue('-2^2')).toBe(-4);
    expect(mathValue('2(3+4)/7')).toBe(2);
    expect(mathValue('10-4-3')).toBe(3);
    expect(mathValue('12/2/3')).toBe(2);
    for (const text of ['', '1+', '(1', '1)', '2x', '3 4', '1\\pm2', '\\frac{1}', '1..2']) {
      expect(mathValue(text), text).toBeUndefined();
    }
  });

  it('gives up on nesting that no answer has, instead of failing', async () => {
    const reward = rewardFunctions.boxed({ column: 'answer' });
    const answers = [
      '('.repeat(900),
      `${'{'.repeat(400)}1${'}'.repeat(400)}`,
      `${'(1,'.repeat(300)}1`,
      '\\sqrt'.repeat(5000),
    ];
    for (const answer of answers) {
      expect(await scored(reward, sample(`\\boxed{${answer}}`, { answer: '1' })), answer.slice(0, 20)).toEqual([0]);
    }
    const long = '1'.repeat(2000);
    expect(await scored(reward, sample(`\\boxed{${long}}`, { answer: long }))).toEqual([1]);
  });

  it('takes the answer from a solution, and gives 0 without a box', async () => {
    const reward = rewardFunctions.boxed({ column: 'solution' });
    const row = { solution: 'Hence $\\boxed{\\frac{1}{2}}$.' };
    expect(await scored(reward, sample('It is $\\boxed{0.5}$', row), sample('It is 0.5', row))).toEqual([1, 0]);
  });
});

describe('regex', () => {
  it('matches anywhere, with flags, the same each time', async () => {
    const reward = rewardFunctions.regex({ pattern: '^<think>.*</think>', flags: 's' });
    const good = sample('<think>a\nb</think> 5');
    expect(await scored(reward, good, good, sample('a <think></think>'))).toEqual([1, 1, 0]);
  });

  it.each([
    ['(', ''],
    ['a', 'q'],
    ['a', 'g'],
    ['a', 'uv'],
  ])('refuses /%s/%s', (pattern, flags) => {
    expect(() => rewardFunctions.regex({ pattern, flags })).toThrow(
      expect.objectContaining({ code: 'REWARD_SETTINGS' }),
    );
  });
});

const tokens = (count: number) =>
  sample(
    '',
    {},
    Array.from({ length: count }, (_, i) => i),
  );

describe('length', () => {
  it('is the soft overlong punishment of DAPO', async () => {
    const reward = rewardFunctions.length({ max: 100, buffer: 20 });
    expect(await scored(reward, ...[0, 80, 85, 90, 100, 110].map(tokens))).toEqual([0, 0, -0.25, -0.5, -1, -1]);
  });

  it('is the bounded distance to a target', async () => {
    const reward = rewardFunctions.length({ target: 10, width: 5 });
    expect(await scored(reward, ...[10, 11, 9, 15, 5, 100, 0].map(tokens))).toEqual([0, -0.2, -0.2, -1, -1, -1, -1]);
  });
});

describe('repetition', () => {
  it('is the share of n-grams that were there before', async () => {
    const bigrams = rewardFunctions.repetition({ ngram: 2 });
    // The published value of TRL's bigram penalty for five equal tokens.
    expect(await scored(bigrams, sample('', {}, [5, 5, 5, 5, 5]))).toEqual([-0.75]);
    expect(await scored(bigrams, sample('', {}, [1, 2, 1, 2]), tokens(9))).toEqual([2 / 3 - 1, 0]);
    // 1, 12 and 11, 2 are different bigrams.
    expect(await scored(bigrams, sample('', {}, [1, 12, 11, 2]))).toEqual([0]);
    expect(await scored(rewardFunctions.repetition({ ngram: 4 }), tokens(3), tokens(0))).toEqual([0, 0]);
  });
});

describe('cosine', () => {
  const reward = rewardFunctions.cosine({
    ...{ max: 4, correct: [1, 0.5], wrong: [-1, -0.5] },
    answer: { exact: { column: 'answer', ignoreCase: false } },
  });
  const of = (response: string, tokens: number) => sample(response, { answer: 'yes' }, Array(tokens).fill(1));

  it('pays correct answers less, wrong ones more the longer they are, and stays beyond the end', async () => {
    const scores = await scored(reward, of('yes', 2), of('no', 2), of('yes', 4), of('no', 9));
    expect(scores.map((score) => Math.round(Number(score) * 1e12) / 1e12)).toEqual([0.75, -0.75, 0.5, -0.5]);
  });
});
