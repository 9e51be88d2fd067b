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

/** What an unknown name may have meant: the candidate at the smallest edit distance, if that is at most half of the longer word. */
export function nearest(
  word: string,
  candidates: readonly string[],
  by = (name: string): string => name,
): string | undefined {
  let best: string | undefined;
  let bestDistance = Number.POSITIVE_INFINITY;
  for (const candidate of candidates) {
    const name = by(candidate);
    const distance = editDistance(word.toLowerCase(), name.toLowerCase());
    const limit = Math.max(word.length, name.length) / 2;
    if (distance <= limit && distance < bestDistance) [best, bestDistance] = [candidate, distance];
  }
  return best;
}

/** Levenshtein distance. */
export function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + Number(a[i - 1] !== b[j - 1]));
    }
    row = next;
  }
  return row[b.length]!;
}
