/**
 * SIGINT and SIGTERM: the first asks for an orderly end (training finishes its step and saves), the second ends the process
 * at once; of a command that can be cancelled it is the second that cancels, and the third that ends the process. Handlers are installed only while a command that can end in order is running.
 */
import { constants } from 'node:os';
import type { Terminal } from './terminal.js';

type SignalName = 'SIGINT' | 'SIGTERM';
const names: readonly SignalName[] = ['SIGINT', 'SIGTERM'];

export class Interrupts {
  readonly #controller = new AbortController();
  readonly #cancel = new AbortController();
  #received: SignalName | undefined;

  constructor(private readonly terminal: Terminal) {}

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** 130 after SIGINT, 143 after SIGTERM; undefined before either. */
  get exitCode(): number | undefined {
    return this.#received === undefined ? undefined : 128 + constants.signals[this.#received];
  }

  /** Runs `work` with the handlers in place; `promise` says what an orderly end does, `cancelling` what a cancel does. */
  async during<T>(
    promise: string,
    work: (signal: AbortSignal, cancel: AbortSignal) => Promise<T>,
    cancelling?: string,
  ): Promise<T> {
    const handle = (name: SignalName) => this.#receive(name, promise, cancelling);
    for (const name of names) process.on(name, handle);
    try {
      return await work(this.signal, this.#cancel.signal);
    } finally {
      for (const name of names) process.off(name, handle);
    }
  }

  #receive(name: SignalName, promise: string, cancelling: string | undefined): void {
    const reason = new DOMException(`interrupted by ${name}`, 'AbortError');
    if (this.#received === undefined) {
      this.#received = name;
      this.terminal.error(`${name}: ${promise}; again ends at once`);
      this.#controller.abort(reason);
      return;
    }
    if (cancelling === undefined || this.#cancel.signal.aborted) process.exit(128 + constants.signals[name]);
    this.#received = name;
    this.terminal.error(`${name}: ${cancelling}; again ends the process`);
    this.#cancel.abort(reason);
  }
}
