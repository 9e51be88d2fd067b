/** What a failed command says and exits with. */
import { LockstepError } from '../errors.js';

/** Errors of the text that a user typed, besides CONFIG_* and USAGE_*: layouts that a model cannot have. */
const wrongText = new Set(['PARALLEL_INVALID', 'PARTS_INVALID']);

/** 2 when the command line or the configuration is wrong, else 1. */
export function exitCodeOf(error: unknown): number {
  if (!LockstepError.isInstance(error)) return 1;
  return /^(CONFIG|USAGE)_/.test(error.code) || wrongText.has(error.code) ? 2 : 1;
}

/** The message, its code, and with `verbose` the stack and the causes. */
export function describeFailure(error: unknown, verbose: boolean): string {
  if (!(error instanceof Error)) return String(error);
  const code = LockstepError.isInstance(error) ? error.code : (error as NodeJS.ErrnoException).code;
  const head = `error${code ? ` ${code}` : ''}: ${error.message}`;
  if (verbose) return `${head}\n${stacks(error)}`;
  const unexpected = code === undefined && !LockstepError.isInstance(error);
  return unexpected ? `${head}\nThis is a defect of Lockstep; --verbose shows where it happened.` : head;
}

function stacks(error: Error): string {
  const own = error.stack ?? error.message;
  return error.cause instanceof Error ? `${own}\ncaused by ${stacks(error.cause)}` : own;
}
