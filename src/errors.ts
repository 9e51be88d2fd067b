/** Machine-readable reasons of failure. The CLI maps `CONFIG_*` and `USAGE_*` to exit code 2, everything else to 1. */
export type ErrorCode = `${Uppercase<string>}`;

/** Facts about a failure that a program may want to read: a file, a line, a tensor, an expectation. */
export type ErrorDetails = Readonly<Record<string, unknown>>;

const marker = Symbol.for('lockstep.error');

/**
 * The one error class of the library. `message` says what happened, where, what was expected and received, and what to
 * do; `code` is stable.
 */
export class LockstepError extends Error {
  override readonly name = 'LockstepError';
  readonly [marker] = true;

  constructor(
    readonly code: ErrorCode,
    message: string,
    readonly details: ErrorDetails = {},
    options?: ErrorOptions,
  ) {
    super(message, options);
  }

  /** True for an error of any copy of this package (instanceof fails across duplicate installs). */
  static isInstance(error: unknown): error is LockstepError {
    return typeof error === 'object' && error !== null && (error as Record<symbol, unknown>)[marker] === true;
  }
}
