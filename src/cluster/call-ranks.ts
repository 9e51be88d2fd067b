/** One call on all ranks of a group: they start together, and when one fails the others are released. */
import { LockstepError } from '../errors.js';
import { type Coordinates, coordinatesOf } from '../layout/parallel.js';
import { callContext, inContext, linkedSignal } from './call-context.js';
import type { RankLayout } from './routing.js';
import type { Transport } from './transport.js';

// biome-ignore lint/suspicious/noExplicitAny: methods of any arguments
export type Method = (...args: any[]) => unknown;

export interface Group {
  readonly name: string;
  readonly ranks: RankLayout;
  /** By rank. */
  readonly workers: readonly Readonly<Record<string, Method>>[];
  readonly transport: Transport;
  /** How long a call that failed waits for the ranks that are still running. */
  readonly timeoutSeconds: number;
}

/** In `details.failures` of a `RANK_FAILED`, in the order of time; the first one's error is its cause. */
export interface RankFailure {
  readonly rank: number;
  readonly coordinates: Coordinates;
  readonly error: unknown;
}

/** What each rank of a call is given, and whose answers it gives back. */
export interface Spread {
  readonly collected: readonly boolean[];
  /** By rank; see `callFirstRow`. Default: 0. */
  readonly firstRows?: readonly number[] | undefined;
  argsOf(rank: number): readonly unknown[];
}

/** setTimeout takes no more milliseconds. */
const longestTimer = 2 ** 31 - 1;

/**
 * Answers by rank, undefined for those that are not `collected`.
 * @throws LockstepError RANK_FAILED once every rank has returned or the time-out is over; the reason of the call that this one is
 * part of, when that is released.
 */
export async function callRanks(
  group: Group,
  method: string,
  { collected, firstRows, argsOf }: Spread,
): Promise<unknown[]> {
  const { name, ranks, workers, transport, timeoutSeconds } = group;
  const outside = callContext();
  outside?.signal.throwIfAborted();
  const release = new AbortController();
  const { signal, unlink } = linkedSignal([outside?.signal, release.signal]);
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<void>((resolve) => {
    const wait = () => {
      timer = setTimeout(resolve, Math.min(timeoutSeconds * 1000, longestTimer));
    };
    signal.addEventListener('abort', wait, { once: true });
  });

  const answers: unknown[] = workers.map(() => undefined);
  const running = new Set(workers.keys());
  const failures: RankFailure[] = [];
  const runs = workers.map(async (worker, rank) => {
    try {
      const firstRow = firstRows?.[rank] ?? 0;
      const call = { group: name, method, rank, args: argsOf(rank), answers: collected[rank]!, signal };
      const answer = await transport.call(call, async (args) =>
        inContext({ ...outside, signal, firstRow }, () => worker[method]!(...args)),
      );
      if (collected[rank]) answers[rank] = answer;
    } catch (error) {
      if (!isRelease(error, signal)) failures.push({ rank, coordinates: coordinatesOf(rank, ranks.layout), error });
      release.abort(new LockstepError('RANK_RELEASED', `${name}.${method} failed on rank ${rank}: ${reasonOf(error)}`));
    } finally {
      running.delete(rank);
    }
  });
  await Promise.race([Promise.all(runs), late]);
  clearTimeout(timer);
  unlink();
  outside?.signal.throwIfAborted();
  if (failures.length > 0) throw rankError(group, method, [...failures], [...running]);
  return answers;
}

/** A rank that stopped because it was told to is not one that failed. */
function isRelease(error: unknown, signal: AbortSignal): boolean {
  if (!signal.aborted) return false;
  return error === signal.reason || (error instanceof Error && error.name === 'AbortError');
}

function rankError(
  { name, workers, timeoutSeconds }: Group,
  method: string,
  failures: readonly RankFailure[],
  running: readonly number[],
): LockstepError {
  const told = failures.map(({ rank, coordinates: { pipeline, tensor, data }, error }) => {
    return `rank ${rank} (pipeline ${pipeline}, tensor ${tensor}, data ${data}): ${reasonOf(error)}`;
  });
  const others =
    running.length > 0
      ? `Ranks [${running.join(', ')}] did not return within ${timeoutSeconds} s of that and may still be running; ` +
        'do not use the group again.'
      : 'All other ranks have returned.';
  return new LockstepError(
    'RANK_FAILED',
    `${name}.${method} failed on ${failures.length} of ${workers.length} ranks. ${told.join('; ')}. ${others}`,
    { group: name, method, ranks: failures.map(({ rank }) => rank), failures, running },
    { cause: failures[0]!.error },
  );
}

function reasonOf(error: unknown): string {
  return error instanceof Error ? error.message.replace(/\.$/, '') : String(error);
}
