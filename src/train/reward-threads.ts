/**
 * A reward function over worker threads: a worker group whose ranks are threads. Batches are its rows, so that the function is called
 * with the same ones by any number of threads, and the rewards come back in the order of samples.
 */
import type { Transport } from '../cluster/transport.js';
import { WorkerGroup } from '../cluster/worker-group.js';
import { LockstepError } from '../errors.js';
import { type Batch, batchesOf, type Reward, type RewardSample } from '../rewards/reward-function.js';
import { openThread, type RewardThread, type ThreadSource } from '../rewards/thread.js';
import type { Closable } from './closing.js';

export interface RewardThreadsOptions {
  /** What errors call the function; they add which thread. */
  readonly name: string;
  readonly threads: number;
  /** Samples per call; default: all in equal shares, one for each thread. */
  readonly batchSize?: number | undefined;
  /** For each call, and for loading; then the thread is ended. */
  readonly timeoutSeconds: number;
  /** Ends the threads while they load. */
  readonly signal?: AbortSignal | undefined;
}

/** Scores samples. Aborting the signal ends the threads; later calls then fail. */
export interface Scorer extends Closable {
  score(samples: readonly RewardSample[], signal: AbortSignal): Promise<Reward[]>;
}

/**
 * Loads the function into every thread. Throws what `openThread` does. A call throws what `RewardThread.score` does: the error of the
 * thread that fails first, which ends those that are still running.
 */
export async function openRewardThreads(source: ThreadSource, options: RewardThreadsOptions): Promise<Scorer> {
  const { threads: count, batchSize, timeoutSeconds, signal: loading } = options;
  const opened = await Promise.allSettled(
    Array.from({ length: count }, (_, i) =>
      openThread(source, { name: `${options.name} (thread ${i + 1} of ${count})`, timeoutSeconds, signal: loading }),
    ),
  );
  const threads = opened.flatMap((result) => (result.status === 'fulfilled' ? [result.value] : []));
  const close = async () => void (await Promise.all(threads.map((thread) => thread.close())));
  const failed = opened.find((result) => result.status === 'rejected');
  if (failed) {
    await close();
    throw failed.reason;
  }
  const group = WorkerGroup.create({
    name: 'rewards',
    layout: { pipeline: 1, tensor: 1, data: count },
    worker: threads.map((thread) => ({ score: (batches: readonly Batch[]) => thread.score(batches) })),
    protocols: { score: 'DP_PROTO' },
    transport: new ThreadTransport(threads),
  });
  return {
    score: async (samples, signal) => {
      const batches = batchesOf(samples, batchSize ?? Math.ceil(samples.length / count));
      const stop = () => void close();
      signal.addEventListener('abort', stop, { once: true });
      try {
        signal.throwIfAborted();
        return (await group.score(batches)).flat();
      } catch (error) {
        signal.throwIfAborted();
        // What the thread says itself, not that one of the ranks has failed.
        throw LockstepError.isInstance(error) && error.code === 'RANK_FAILED' ? error.cause : error;
      } finally {
        signal.removeEventListener('abort', stop);
      }
    },
    close,
  };
}

/** Calls go as messages to the rank's thread, which has the worker: none runs in the caller's thread. */
class ThreadTransport implements Transport {
  bytesCopied = 0;

  constructor(private readonly threads: readonly RewardThread[]) {}

  async call({ rank, args, signal }: Parameters<Transport['call']>[0]): Promise<Reward[][]> {
    const [batches] = args as [readonly Batch[]];
    for (const { samples } of batches) for (const { tokens } of samples) this.bytesCopied += tokens.byteLength;
    return this.threads[rank]!.score(batches, signal);
  }
}
