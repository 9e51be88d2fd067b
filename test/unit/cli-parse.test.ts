import { describe, expect, test } from 'vitest';
import type { Command } from '../../src/cli/command.js';
import { describeFailure, exitCodeOf } from '../../src/cli/failure.js';
import { generateCommand } from '../../src/cli/generate.js';
import { commandHelp } from '../../src/cli/help.js';
import { modelOptions } from '../../src/cli/model-input.js';
import { parseCommandLine } from '../../src/cli/parse.js';
import { scoreCommand } from '../../src/cli/score.js';
import { choice, number, text } from '../../src/cli/values.js';
import { LockstepError } from '../../src/errors.js';

const command: Command = {
  name: 'paint',
  summary: 'paint a wall',
  words: [{ name: 'WALL', help: 'which wall' }],
  flags: {
    colour: { value: 'NAME', help: 'the colour' },
    coats: { value: 'N', help: 'how many' },
    set: { value: 'path=value', help: 'a setting', repeated: true },
    json: { help: 'as JSON' },
  },
  examples: ['lockstep paint north'],
  run: async () => 0,
};

const parse = (...args: string[]) => parseCommandLine(command, args);

async function failure(...args: string[]): Promise<LockstepError> {
  const error = await parse(...args).catch((reason: unknown) => reason);
  expect(LockstepError.isInstance(error)).toBe(true);
  expect(exitCodeOf(error)).toBe(2);
  return error as LockstepError;
}

describe('a command line', () => {
  test('gives words, values and switches, whatever their order', async () => {
    const input = await parse('--colour', 'red', 'north', '--json', '--set=a.b=1', '--set', 'c=x y');
    expect(input.words).toEqual(['north']);
    expect(text(input, 'colour')).toBe('red');
    expect(input.values.get('set')).toEqual(['a.b=1', 'c=x y']);
    expect([...input.switches]).toEqual(['json']);
  });

  test('takes a value that begins with a dash, and words after --', async () => {
    expect(text(await parse('north', '--colour', '-red'), 'colour')).toBe('-red');
    expect((await parse('--', '--north')).words).toEqual(['--north']);
  });

  test.each([
    [['north', '--color', 'red'], 'USAGE_FLAG', '--colour'],
    [['north', '--qqqqqqqq'], 'USAGE_FLAG', 'known flags: --colour'],
    [['north', '--colour'], 'USAGE_VALUE', '--colour NAME'],
    [['north', '--colour', '--json'], 'USAGE_VALUE', '--colour=--json'],
    [['north', '--colour', 'a', '--colour', 'b'], 'USAGE_VALUE', 'more than once'],
    [['north', '--json=yes'], 'USAGE_VALUE', 'takes no value'],
    [[], 'USAGE_WORDS', 'WALL is missing: which wall'],
    [['north', 'south'], 'USAGE_WORDS', 'unexpected argument south'],
  ])('%j is refused with %s and names %s', async (args, code, words) => {
    const error = await failure(...args);
    expect(error.code).toBe(code);
    expect(error.message).toContain(words);
  });

  test('asks for help without its words', async () => {
    expect((await parse('-h')).switches.has('help')).toBe(true);
  });

  test('help names every word, flag and example', () => {
    const help = commandHelp(command);
    for (const part of [
      'WALL',
      '--colour NAME',
      '--set path=value...',
      '--json',
      '--verbose',
      'lockstep paint north',
    ]) {
      expect(help).toContain(part);
    }
    expect(
      Math.max(
        ...commandHelp(generateCommand)
          .split('\n')
          .map((line) => line.length),
      ),
    ).toBeLessThanOrEqual(110);
  });
});

describe('values', () => {
  const input = (coats: string) => parse('north', '--coats', coats);

  test.each(['2', '-1', '1e-3', '0.5'])('%s is a number', async (given) => {
    expect(number(await input(given), 'coats')).toBe(Number(given));
  });

  test.each([
    ['two', {}],
    ['', {}],
    ['NaN', {}],
    ['Infinity', {}],
    ['0', { minimum: 1 }],
    ['3', { maximum: 2 }],
    ['1.5', { whole: true }],
    ['1e300', { whole: true }],
  ])('%s is refused under %j', async (given, range) => {
    const parsed = await input(given);
    expect(() => number(parsed, 'coats', range)).toThrow(`--coats: expected`);
  });

  test('a choice is one of its words', async () => {
    expect(choice(await parse('north', '--colour', 'red'), 'colour', ['red', 'blue'])).toBe('red');
    expect(choice(await parse('north'), 'colour', ['red', 'blue'])).toBeUndefined();
    const green = await parse('north', '--colour', 'green');
    expect(() => choice(green, 'colour', ['red', 'blue'])).toThrow('--colour: expected red or blue, received green');
  });

  test('a model runs on as many ranks as the flags say', async () => {
    const options = async (...args: string[]) => modelOptions(await parseCommandLine(scoreCommand, ['m', ...args]));
    expect(await options('--dtype', 'bfloat16')).toEqual({ model: 'm', dtype: 'bfloat16' });
    expect(await options('--tensor', '4', '--pipeline', '2')).toEqual({ model: 'm', tensor: 4, pipeline: 2 });
    for (const flag of ['--tensor', '--pipeline']) {
      const error = await options(flag, '0').catch((reason: unknown) => reason);
      expect(error).toMatchObject({ code: 'USAGE_VALUE' });
      expect(exitCodeOf(error)).toBe(2);
    }
  });
});

describe('a failure', () => {
  test.each([
    ['CONFIG_UNKNOWN_KEY', 2],
    ['USAGE_FLAG', 2],
    ['PARALLEL_INVALID', 2],
    ['DATA_BAD_ROW', 1],
    ['RUN_EXISTS', 1],
  ] as const)('%s exits with %d', (code, exitCode) => {
    expect(exitCodeOf(new LockstepError(code, 'no'))).toBe(exitCode);
  });

  test('shows its code and message, and its stack and causes only when asked', () => {
    const error = new LockstepError('DATA_BAD_ROW', 'line 2 is bad', {}, { cause: new Error('deeper') });
    expect(describeFailure(error, false)).toBe('error DATA_BAD_ROW: line 2 is bad');
    expect(describeFailure(error, true)).toMatch(/\n {4}at [\s\S]*caused by Error: deeper/);
    expect(describeFailure(new TypeError('x is undefined'), false)).toContain('--verbose');
    expect(describeFailure(new TypeError('x is undefined'), false)).not.toContain('    at ');
  });
});
