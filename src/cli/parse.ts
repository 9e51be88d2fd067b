/** From arguments to a command's input, with messages that name the nearest thing that exists. */
import { parseArgs } from 'node:util';
import { LockstepError, nearest } from '../errors.js';
import { type Command, commonFlags, type Flag, type Input } from './command.js';

type Token = ReturnType<typeof tokensOf>[number];

function tokensOf(args: readonly string[], flags: Readonly<Record<string, Flag>>) {
  const options = Object.fromEntries(
    Object.entries(flags).map(([name, { value }]) => [
      name,
      { type: value === undefined ? ('boolean' as const) : ('string' as const), multiple: true as const },
    ]),
  );
  return parseArgs({ args: [...args], options, strict: false, allowPositionals: true, tokens: true }).tokens;
}

/**
 * @throws LockstepError USAGE_FLAG for an unknown flag, USAGE_VALUE for a flag with a value missing, too much or given
 * twice, USAGE_WORDS for words missing or too many.
 */
export async function parseCommandLine(command: Command, args: readonly string[]): Promise<Input> {
  const flags: Readonly<Record<string, Flag>> = { ...command.flags, ...commonFlags };
  const values = new Map<string, string[]>();
  const switches = new Set<string>();
  const words: string[] = [];
  for (const token of tokensOf(args.map(longForm), flags)) {
    if (token.kind === 'positional') words.push(token.value);
    if (token.kind !== 'option') continue;
    const flag = Object.hasOwn(flags, token.name) ? flags[token.name] : undefined;
    if (flag === undefined) throw unknownFlag(command, token.rawName, Object.keys(flags));
    if (flag.value === undefined) switches.add(switchOf(command, token));
    else values.set(token.name, [...(values.get(token.name) ?? []), flagValue(command, token, flag, values, flags)]);
  }
  if (!switches.has('help')) checkWords(command, words);
  return { words, values, switches };
}

function longForm(argument: string): string {
  return argument === '-h' ? '--help' : argument === '-q' ? '--quiet' : argument;
}

function switchOf(command: Command, token: Extract<Token, { kind: 'option' }>): string {
  if (token.value === undefined) return token.name;
  throw usage(command, 'USAGE_VALUE', `${token.rawName} takes no value, received ${token.value}`);
}

function flagValue(
  command: Command,
  { name, rawName, value, inlineValue }: Extract<Token, { kind: 'option' }>,
  flag: Flag,
  values: ReadonlyMap<string, readonly string[]>,
  flags: Readonly<Record<string, Flag>>,
): string {
  if (value === undefined) {
    throw usage(command, 'USAGE_VALUE', `${rawName} needs a value: ${rawName} ${flag.value}`);
  }
  const swallowed = !inlineValue && value.startsWith('--') && Object.hasOwn(flags, value.slice(2).split('=')[0]!);
  if (swallowed) {
    throw usage(
      command,
      'USAGE_VALUE',
      `${rawName} needs a value before ${value}; write ${rawName}=${value} if that is the value`,
    );
  }
  if (!flag.repeated && values.has(name)) throw usage(command, 'USAGE_VALUE', `${rawName} is given more than once`);
  return value;
}

function unknownFlag(command: Command, rawName: string, known: readonly string[]): LockstepError {
  const guess = nearest(rawName.replace(/^-+/, ''), known);
  const hint = guess ? `did you mean --${guess}?` : `known flags: ${known.map((name) => `--${name}`).join(', ')}`;
  return usage(command, 'USAGE_FLAG', `unknown flag ${rawName}; ${hint}`);
}

function checkWords(command: Command, words: readonly string[]): void {
  const needed = command.words.filter(({ optional }) => !optional);
  const missing = needed[words.length];
  if (missing) throw usage(command, 'USAGE_WORDS', `${missing.name} is missing: ${missing.help}`);
  const extra = words[command.words.length];
  if (extra !== undefined) throw usage(command, 'USAGE_WORDS', `unexpected argument ${extra}`);
}

function usage(command: Command, code: 'USAGE_FLAG' | 'USAGE_VALUE' | 'USAGE_WORDS', what: string): LockstepError {
  return new LockstepError(code, `${what} (lockstep ${command.name} --help shows all)`, { command: command.name });
}
