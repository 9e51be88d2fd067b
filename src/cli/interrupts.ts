/**
 * SIGINT and SIGTERM: the first asks for an orderly end (training finishes its step and saves), the second ends the process
 * at once. Handlers are installed only while a command that can end in order is running.
 */
import { constants } from 'node:os';
import type { Terminal } from './terminal.js';

type SignalName = 'SIGINT' | 'SIGTERM';
const names: readonly SignalName[] = ['SIGINT', 'SIGTERM'];

export class Interrupts {
  readonly #controller = new AbortController();
  #received: SignalName | undefined;

  constructor(private readonly terminal: Terminal) {}

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** 130 after SIGINT, 143 after SIGTERM; undefined before either. */
  get exitCode(): number | undefined {
    return this.#received === undefined ? undefined : 128 + constants.signals[this.#received];
  }

  /** Runs `work` with the handlers in place; `promise` says what an orderly end does. */
  async during<T>(promise: string, work: (signal: AbortSignal) => Promise<T>): Promise<T> {
    const handle = (name: SignalName) => this.#receive(name, promise);
    for (const name of names) process.on(name, handle);
    try {
      return await work(this.signal);
    } finally {
      for (const name of names) process.off(name, handle);
    }
  }

  #receive(name: SignalName, promise: string): void {
    if (this.#received !== undefined) process.exit(128 + constants.signals[name]);
    this.#received = name;
    this.terminal.error(`${name}: ${promise}; again ends at once`);
    this.#controller.abort(new DOMException(`interrupted by ${name}`, 'AbortError'));
  }
}
