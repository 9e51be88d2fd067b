/** Help texts, made from the same tables that parsing uses. */
import { type Command, commonFlags, type Flag } from './command.js';

const width = 100;

export function commandHelp(command: Command): string {
  const words = command.words.map(({ name, optional }) => (optional ? `[${name}]` : name));
  const flags = Object.keys(command.flags).length > 0 ? ' [flags]' : '';
  return [
    `lockstep ${command.name}: ${command.summary}`,
    '',
    `Usage: lockstep ${[command.name, ...words].join(' ')}${flags}`,
    ...table(command.words.map(({ name, help }) => [name, help])),
    '',
    'Flags:',
    ...table(
      Object.entries({ ...command.flags, ...commonFlags }).map(([name, flag]) => [flagText(name, flag), flag.help]),
    ),
    ...(command.notes ?? []).flatMap((note) => ['', ...wrap(note, width)]),
    '',
    'Examples:',
    ...command.examples.map((example) => `  ${example}`),
  ].join('\n');
}

export function overview(commands: Readonly<Record<string, { summary: string }>>): string {
  return [
    'Lockstep: reinforcement learning from human feedback for Node.js',
    '',
    'Usage: lockstep COMMAND [arguments] [flags]',
    '',
    'Commands:',
    ...table(Object.entries(commands).map(([name, { summary }]) => [name, summary])),
    '',
    'Flags:',
    ...table([
      ['--help', 'Show this help, or that of a command'],
      ['--version', 'Show the version'],
    ]),
    '',
    'Exit codes: 0 done; 1 failed while reading or running; 2 command line or configuration wrong;',
    '130, 143 interrupted (training saves a checkpoint first).',
    '',
    'Examples:',
    '  lockstep train config.yaml --set optimizer.learningRate=1e-5',
    '  lockstep generate path/to/model --prompt "Once upon a time" --temperature 0.8',
    '  lockstep report runs/ppo',
  ].join('\n');
}

function flagText(name: string, { value, repeated }: Flag): string {
  return `--${name}${value === undefined ? '' : ` ${value}`}${repeated ? '...' : ''}`;
}

function table(rows: readonly (readonly [string, string])[]): string[] {
  const first = Math.min(34, Math.max(0, ...rows.map(([name]) => name.length)));
  return rows.flatMap(([name, help]) => {
    const [line, ...more] = wrap(help, width - first - 4);
    const indent = ' '.repeat(first + 4);
    const head = name.length > first ? [`  ${name}`, `${indent}${line}`] : [`  ${name.padEnd(first)}  ${line}`];
    return [...head, ...more.map((text) => `${indent}${text}`)];
  });
}

function wrap(text: string, columns: number): string[] {
  const lines: string[] = [];
  let line = '';
  for (const word of text.split(' ')) {
    if (line !== '' && line.length + 1 + word.length > columns) {
      lines.push(line);
      line = word;
    } else {
      line = line === '' ? word : `${line} ${word}`;
    }
  }
  return [...lines, line];
}
