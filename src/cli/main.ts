#!/usr/bin/env node
/** The entry of the command line: finds the command, runs it, turns its end into an exit code. */
import { LockstepError, nearest } from '../errors.js';
import type { Command } from './command.js';
import { describeFailure, exitCodeOf } from './failure.js';
import { Interrupts } from './interrupts.js';
import { Terminal } from './terminal.js';

/** Commands load when they are called, so that help comes at once. */
const commands: Readonly<Record<string, { summary: string; load: () => Promise<Command> }>> = {
  train: {
    summary: 'Train a model: fine-tuning, reward models, PPO and its relatives, preferences',
    load: async () => (await import('./train.js')).trainCommand,
  },
  generate: {
    summary: 'Generate text with a model',
    load: async () => (await import('./generate.js')).generateCommand,
  },
  score: {
    summary: 'Log-probabilities, values or scores of given sequences',
    load: async () => (await import('./score.js')).scoreCommand,
  },
  report: {
    summary: 'Summarise a run and write its HTML report',
    load: async () => (await import('./report.js')).reportCommand,
  },
  quickstart: {
    summary: 'See all of it at once: data, a small model, fine-tuning, reward model, PPO',
    load: async () => (await import('./quickstart.js')).quickstartCommand,
  },
  bench: {
    summary: 'Measure speed',
    load: async () => (await import('./bench.js')).benchCommand,
  },
  doctor: {
    summary: 'Check this machine: CPU, memory, native addon',
    load: async () => (await import('./doctor.js')).doctorCommand,
  },
};

async function main(args: readonly string[]): Promise<number> {
  const terminal = new Terminal();
  const interrupts = new Interrupts(terminal);
  // Before the command line is understood, the flag's presence is all there is to go by.
  const verbose = args.includes('--verbose');
  try {
    return await dispatch(args, { terminal, interrupts, verbose });
  } catch (error) {
    const interrupted = interrupts.exitCode ?? (terminal.closed.aborted ? 0 : undefined);
    if (interrupted !== undefined && isAbort(error)) return interrupted;
    terminal.error(describeFailure(error, verbose));
    return exitCodeOf(error);
  } finally {
    await terminal.finish();
  }
}

/** The end that an aborted signal asked for: its reason, or an error made of it. */
function isAbort(error: unknown): boolean {
  const { name, code } = error as { name?: string; code?: string };
  return name === 'AbortError' || code === 'ABORTED' || code === 'ABORT_ERR' || code === 'EPIPE';
}

async function dispatch(
  [name, ...rest]: readonly string[],
  session: { terminal: Terminal; interrupts: Interrupts; verbose: boolean },
): Promise<number> {
  const { terminal } = session;
  if (name === undefined || name === '--help' || name === '-h' || (name === 'help' && rest.length === 0)) {
    const { overview } = await import('./help.js');
    if (name !== undefined) terminal.print(overview(commands));
    else terminal.error(overview(commands));
    return name === undefined ? 2 : 0;
  }
  if (name === '--version' || name === '-v') {
    const { packageVersion } = await import('./package.js');
    terminal.print(packageVersion());
    return 0;
  }
  if (name === 'help') return dispatch([rest[0]!, '--help'], session);
  const entry = Object.hasOwn(commands, name) ? commands[name] : undefined;
  if (entry === undefined) throw unknownCommand(name);
  const command = await entry.load();
  const { parseCommandLine } = await import('./parse.js');
  const input = await parseCommandLine(command, rest);
  if (input.switches.has('help')) {
    const { commandHelp } = await import('./help.js');
    terminal.print(commandHelp(command));
    return 0;
  }
  terminal.quiet = input.switches.has('quiet');
  return command.run(input, { ...session, verbose: input.switches.has('verbose') });
}

function unknownCommand(name: string): LockstepError {
  const known = Object.keys(commands);
  const guess = nearest(name, known);
  const hint = guess ? `did you mean ${guess}?` : `commands: ${known.join(', ')}`;
  return new LockstepError('USAGE_COMMAND', `unknown command ${name}; ${hint} (lockstep --help)`, { name });
}

process.exit(await main(process.argv.slice(2)));
