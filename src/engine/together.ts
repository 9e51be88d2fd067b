/** Calls of all ranks of a world: they end together. */
import { LockstepError } from '../errors.js';

/** Errors that tell a rank of another's failure: the other's says more. */
const echoes = new Set(['RANK_ABORTED', 'RANK_LEFT']);

/** All results, or, when every rank has ended, the error that made the others fail. */
export async function together<T>(calls: readonly Promise<T>[]): Promise<T[]> {
  const settled = await Promise.allSettled(calls);
  const errors = settled.flatMap((result) => (result.status === 'rejected' ? [result.reason as unknown] : []));
  if (errors.length > 0) {
    throw errors.find((error) => !(LockstepError.isInstance(error) && echoes.has(error.code))) ?? errors[0];
  }
  return settled.map((result) => (result as PromiseFulfilledResult<T>).value);
}
