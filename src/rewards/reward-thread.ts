/** Entry of the thread that runs a reward function: loads it, says so, then answers requests, one at a time. */
import { parentPort, workerData } from 'node:worker_threads';
import { LockstepError } from '../errors.js';
import { type Batch, type Reward, type RewardFunction, scoreBatch } from './reward-function.js';
import type { ThreadData, ThreadMessage, ThreadSource } from './thread.js';

const port = parentPort!;
const { source, name } = workerData as ThreadData;
// stdout carries results; what a reward function prints is progress.
process.stdout.write = process.stderr.write.bind(process.stderr) as typeof process.stdout.write;

const send = (message: ThreadMessage): void => port.postMessage(message);

function sendError(error: unknown): void {
  const message = error instanceof Error ? error.message : String(error);
  const { code, details } = LockstepError.isInstance(error) ? error : {};
  try {
    send({ kind: 'error', code, message, details });
  } catch {
    // Details that no message can carry, such as a function that was returned as a reward.
    send({ kind: 'error', code, message, details: { sample: details?.sample } });
  }
}

/** Loads no more than the source needs: every thread of a run waits for it. The time of loading is that of the source's own code. */
async function open(from: ThreadSource): Promise<RewardFunction> {
  if ('file' in from) {
    const { loadReward } = await import('./load-reward.js');
    send({ kind: 'loading' });
    return loadReward(from.file);
  }
  return (await import('./built-in/registry.js')).builtInReward(from.builtIn);
}

/** The time of a call is measured outside: a function that blocks its thread holds up the thread's timers, too. */
const options = {
  name,
  timeoutSeconds: Number.POSITIVE_INFINITY,
  onCall: ({ samples, begin }: Batch) => send({ kind: 'call', begin, count: samples.length }),
};

try {
  const reward = await open(source);
  port.on('message', async (batches: readonly Batch[]) => {
    try {
      const rewards: Reward[][] = [];
      for (const batch of batches) rewards.push(await scoreBatch(reward, batch, options));
      send({ kind: 'rewards', rewards });
    } catch (error) {
      sendError(error);
    }
  });
  send({ kind: 'ready' });
} catch (error) {
  sendError(error);
}
