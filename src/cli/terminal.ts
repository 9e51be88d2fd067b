/**
 * The two output streams: stdout carries results, stderr progress. On a terminal the last line of progress renews itself;
 * elsewhere progress is plain lines. A reader that goes away (EPIPE) ends output, not the process.
 */
import type { Writable } from 'node:stream';

type Stream = Writable & { isTTY?: boolean; columns?: number };

export interface TerminalOptions {
  stdout?: Stream;
  stderr?: Stream;
  environment?: Readonly<Record<string, string | undefined>>;
  quiet?: boolean;
}

const codes = { bold: 1, dim: 2, red: 31, green: 32, yellow: 33, cyan: 36 };
export type Style = keyof typeof codes;

export class Terminal {
  quiet: boolean;
  /** Aborted when nobody reads stdout any more. */
  readonly closed: AbortSignal;
  /** Progress renews one line. */
  readonly live: boolean;
  readonly #colours: boolean;
  readonly #stdout: Stream;
  readonly #stderr: Stream;
  #status = '';
  #stderrClosed = false;

  constructor({
    stdout = process.stdout,
    stderr = process.stderr,
    environment = process.env,
    quiet = false,
  }: TerminalOptions = {}) {
    const closing = new AbortController();
    this.closed = closing.signal;
    this.quiet = quiet;
    this.#stdout = stdout;
    this.#stderr = stderr;
    const plain = environment.TERM === 'dumb' || (environment.CI !== undefined && environment.CI !== '');
    this.live = stderr.isTTY === true && !plain;
    this.#colours = this.live && !environment.NO_COLOR;
    stdout.on('error', (error: NodeJS.ErrnoException) => {
      if (error.code !== 'EPIPE') throw error;
      closing.abort(error);
    });
    stderr.on('error', () => {
      this.#stderrClosed = true;
    });
  }

  get columns(): number {
    return this.#stderr.columns || 80;
  }

  /** Text of a result, as it is. */
  write(text: string): void {
    if (this.closed.aborted) return;
    this.#clearStatus();
    this.#stdout.write(text);
  }

  /** A line of a result. */
  print(line: string): void {
    this.write(`${line}\n`);
  }

  /** A lasting line of progress. */
  note(line: string): void {
    if (!this.quiet) this.#lasting(line);
  }

  /** A line that `quiet` does not hide. */
  error(line: string): void {
    this.#lasting(line);
  }

  /** The line that renews itself, in plain characters; only on a terminal. */
  status(line: string): void {
    if (this.quiet || !this.live || this.#stderrClosed) return;
    this.#status = line.slice(0, this.columns - 1);
    this.#stderr.write(`\r\x1b[K${this.#status}`);
  }

  style(style: Style, text: string): string {
    return this.#colours ? `\x1b[${codes[style]}m${text}\x1b[0m` : text;
  }

  /** Removes the renewing line and waits until everything is written. */
  async finish(): Promise<void> {
    this.#clearStatus();
    this.#status = '';
    await Promise.all([drained(this.#stdout), drained(this.#stderr)]);
  }

  #lasting(line: string): void {
    if (this.#stderrClosed) return;
    this.#clearStatus();
    this.#stderr.write(`${line}\n`);
    if (this.#status !== '') this.#stderr.write(this.#status);
  }

  #clearStatus(): void {
    if (this.#status !== '' && !this.#stderrClosed) this.#stderr.write('\r\x1b[K');
  }
}

function drained(stream: Stream): Promise<void> {
  return new Promise((resolve) => {
    if (stream.destroyed || stream.writableEnded) resolve();
    else stream.write('', () => resolve());
  });
}
