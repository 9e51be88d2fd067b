/** Finds calls that hang: those that show no sign of life for too long. */

export interface Silence {
  /** What was seen last, and how long after the begin of the call; absent when there was nothing. */
  readonly last?: { readonly what: string; readonly seconds: number };
  readonly seconds: number;
}

/** CPU time of the process over elapsed time: more than this is no process in which everybody waits. */
const computingShare = 0.05;
const longestCheckSeconds = 10;
const fewestChecks = 4;

/**
 * Of one call. Signs of life are what ranks report, and that the process computes: a single operation of a large model may take
 * longer than any limit, while ranks that wait for a lost one use no processor. So a call that hangs beside one that computes is
 * found when that one has ended. Time is counted in checks, so that a process which was stopped for an hour is not one that hung.
 */
export class Watch {
  readonly #begun = performance.now();
  #seenAt = this.#begun;
  #last: Silence['last'];
  #silentChecks = 0;
  #checked = { at: this.#begun, cpu: process.cpuUsage() };
  readonly #timer: NodeJS.Timeout;

  constructor(timeoutSeconds: number, onSilence: (silence: Silence) => void) {
    const checks = Math.max(fewestChecks, Math.ceil(timeoutSeconds / longestCheckSeconds));
    const check = (): void => {
      if (this.#computes()) this.#seen();
      else if (++this.#silentChecks >= checks) {
        this.stop();
        const seconds = (performance.now() - this.#seenAt) / 1000;
        onSilence({ seconds, ...(this.#last ? { last: this.#last } : {}) });
      }
    };
    this.#timer = setInterval(check, (1000 * timeoutSeconds) / checks);
  }

  alive(what: string): void {
    this.#seen();
    this.#last = { what, seconds: (this.#seenAt - this.#begun) / 1000 };
  }

  stop(): void {
    clearInterval(this.#timer);
  }

  #seen(): void {
    this.#seenAt = performance.now();
    this.#silentChecks = 0;
  }

  #computes(): boolean {
    const before = this.#checked;
    this.#checked = { at: performance.now(), cpu: process.cpuUsage() };
    const { user, system } = process.cpuUsage(before.cpu);
    return (user + system) / 1000 > computingShare * (this.#checked.at - before.at);
  }
}
