/** Errors of calls: they say which worker and method failed and, where the cause knows them, on which rank and sample. */
import { LockstepError } from '../errors.js';

export interface CallName {
  readonly pool: string;
  readonly worker: string;
  readonly method: string;
}

/** The error under the name of its call; code and details of a library error are kept, any other becomes `WORKER_FAILED`. */
export function nameCall(error: unknown, { pool, worker, method }: CallName): LockstepError {
  const facts = causesOf(error).map(({ details }) => details);
  const first = (find: (details: Facts) => unknown): unknown => facts.map(find).find((value) => value !== undefined);
  const rank = first((details) => details.rank ?? (details.ranks as unknown[] | undefined)?.[0]);
  const sample = first((details) => details.sample ?? details.sequence);
  const place = {
    ...(rank === undefined ? {} : { rank }),
    ...(sample === undefined ? {} : { sample }),
  };
  const where = [`${worker}.${method}`, ...Object.entries(place).map(([what, index]) => `${what} ${index}`)].join(', ');
  const known = LockstepError.isInstance(error);
  const message = error instanceof Error ? error.message : String(error);
  return new LockstepError(
    known ? error.code : 'WORKER_FAILED',
    `${where}: ${message}`,
    { ...(known ? error.details : {}), pool, worker, method, ...place },
    { cause: error },
  );
}

type Facts = LockstepError['details'];

/** The library errors among an error and its causes, the outermost first. */
function causesOf(error: unknown): LockstepError[] {
  const found: LockstepError[] = [];
  for (let at = error; at instanceof Error && found.length < 8; at = at.cause) {
    if (LockstepError.isInstance(at)) found.push(at);
  }
  return found;
}
