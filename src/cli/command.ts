/** What a command is: its words, its flags, and how it runs. The command line is data; parsing and help read it. */
import type { Interrupts } from './interrupts.js';
import type { Terminal } from './terminal.js';

export interface Flag {
  /** Placeholder of its value in help; absent for a switch. */
  value?: string;
  help: string;
  /** May be given several times. */
  repeated?: boolean;
}

export interface Command {
  name: string;
  /** One line. */
  summary: string;
  /** Words after the name, such as `MODEL` or `[NAME]`; more words than these are refused. */
  words: readonly { name: string; help: string; optional?: boolean }[];
  flags: Readonly<Record<string, Flag>>;
  /** Paragraphs under the flags. */
  notes?: readonly string[];
  examples: readonly string[];
  /** Resolves to the exit code. */
  run(input: Input, session: Session): Promise<number>;
}

/** A parsed command line. */
export interface Input {
  words: readonly string[];
  /** In the order given. */
  values: ReadonlyMap<string, readonly string[]>;
  switches: ReadonlySet<string>;
}

/** What a command has of its surroundings. */
export interface Session {
  terminal: Terminal;
  interrupts: Interrupts;
  verbose: boolean;
}

/** Flags of every command. */
export const commonFlags: Readonly<Record<string, Flag>> = {
  help: { help: 'Show this help' },
  quiet: { help: 'No progress on stderr, only errors' },
  verbose: { help: 'Every step on stderr, and stack traces of errors' },
};

/** Flags of the commands that open a model. */
export const modelFlags: Readonly<Record<string, Flag>> = {
  dtype: { value: 'float32|bfloat16', help: 'Precision of the computation (default float32)' },
  device: { value: 'cpu|cuda', help: 'What computes (default: GPUs where there are some, else the CPU)' },
  threads: { value: 'N', help: 'Threads that compute (default 2)' },
  tensor: { value: 'N', help: 'Ranks that share each layer; a power of two up to --parts (default 1)' },
  pipeline: { value: 'N', help: 'Stages that the layers are cut into (default 1)' },
  parts: { value: 'N', help: 'Numeric parts, a power of two (default: chosen from the model)' },
};
