/** Entry of the thread that runs a reward file: loads it, says so, then answers each batch of samples in order. */
import { parentPort, workerData } from 'node:worker_threads';
import { LockstepError } from '../errors.js';
import { loadReward, type ThreadAnswer } from './load-reward.js';
import type { RewardFunction, RewardSample } from './reward-function.js';

const port = parentPort!;
// stdout carries results; what a reward function prints is progress.
process.stdout.write = process.stderr.write.bind(process.stderr) as typeof process.stdout.write;
// The thread ends when a call is aborted, so no signal of it ever fires.
const { signal } = new AbortController();

const failed = (error: unknown): ThreadAnswer => {
  const message = error instanceof Error ? error.message : String(error);
  if (!LockstepError.isInstance(error)) return { error: { message } };
  return { error: { message, code: error.code, details: error.details } };
};

async function answer(reward: RewardFunction, samples: RewardSample[]): Promise<ThreadAnswer> {
  try {
    return { rewards: await reward(samples, { signal }) };
  } catch (error) {
    return failed(error);
  }
}

try {
  const reward = await loadReward((workerData as { specifier: string }).specifier);
  let last: Promise<void> = Promise.resolve();
  port.on('message', (samples: RewardSample[]) => {
    last = last.then(async () => port.postMessage(await answer(reward, samples)));
  });
  port.postMessage({ rewards: undefined });
} catch (error) {
  port.postMessage(failed(error));
}
