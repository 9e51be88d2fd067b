/** Calls that end together: when one fails, the others are released, and what was to come of them fails with its error. */
import { callContext, forwardAbort, inContext, releaseController } from './call-context.js';

/**
 * Runs the controller's part of an iteration. The first call of any pool that fails, `work` itself, or a signal ends it: calls that
 * wait are rejected, those that run are told by their signal, and the result rejects with that first error once `work` and all
 * answers have settled. A call whose future nobody awaits counts too.
 * @throws what failed first; the reason of the signal that fired
 */
export async function supervise<T>(work: () => Promise<T>, { signal }: { signal?: AbortSignal } = {}): Promise<T> {
  const outside = callContext();
  const release = releaseController();
  const links = [signal, outside?.signal].flatMap((source) => (source ? [forwardAbort(source, release)] : []));
  const answers = new Set<Promise<unknown>>();
  let failure: { error: unknown } | undefined;
  const fail = (error: unknown): void => {
    failure ??= { error };
    release.abort(error);
  };
  release.signal.addEventListener('abort', () => fail(release.signal.reason), { once: true });
  const watchOver = (answer: Promise<unknown>): void => {
    answers.add(answer);
    const done = () => answers.delete(answer);
    answer.then(done, (error) => {
      done();
      fail(error);
    });
  };
  try {
    release.signal.throwIfAborted();
    const result = await inContext({ ...outside, signal: release.signal, supervisor: { watchOver } }, work);
    while (answers.size > 0) await Promise.allSettled(answers);
    if (failure) throw failure.error;
    return result;
  } catch (error) {
    fail(error);
    await Promise.allSettled(answers);
    throw failure!.error;
  } finally {
    for (const unlink of links) unlink();
  }
}
