/** Rewards from a function of the user's: its contract, and the runner that holds it to it. */
import { type ErrorCode, LockstepError } from '../errors.js';

export interface RewardSample {
  readonly prompt: string;
  readonly response: string;
  /** Token ids of the response. */
  readonly tokens: Int32Array;
  /** The data row of the prompt, with all its columns. */
  readonly row: Readonly<Record<string, unknown>>;
}

/** The reward of response tokens [end of the step before, end); it belongs to token end − 1. */
export interface RewardStep {
  /** At most the number of response tokens, greater than that of the step before. */
  readonly end: number;
  readonly reward: number;
}

/** A score of the answer, one number per response token, or a score with rewards of steps. */
export type Reward = number | readonly number[] | { readonly total: number; readonly steps: readonly RewardStep[] };

export type RewardFunction = (
  samples: readonly RewardSample[],
  context: { readonly signal: AbortSignal },
) => readonly Reward[] | Promise<readonly Reward[]>;

export interface RewardOptions {
  /** Samples per call; all at once by default. */
  readonly batchSize?: number | undefined;
  /** For each call. A function that blocks its thread can only be stopped when it runs in one of its own (`openReward`). */
  readonly timeoutSeconds: number;
  readonly signal?: AbortSignal | undefined;
}

/**
 * Calls the function on all samples, batch after batch, and checks what it returns. Throws `REWARD_THREW`,
 * `REWARD_TIMEOUT`, `REWARD_COUNT`, `REWARD_SHAPE` or `REWARD_NOT_FINITE`, naming the sample; when a batch of several throws, its
 * samples are tried one by one to find the one to name.
 */
export async function scoreSamples(
  reward: RewardFunction,
  samples: readonly RewardSample[],
  options: RewardOptions,
): Promise<Reward[]> {
  const size = options.batchSize ?? Math.max(samples.length, 1);
  const rewards: Reward[] = [];
  for (let begin = 0; begin < samples.length; begin += size) {
    options.signal?.throwIfAborted();
    const batch = { samples: samples.slice(begin, begin + size), begin };
    const returned = await call(reward, batch, options).catch((error) => blame(error, reward, batch, options));
    rewards.push(...checked(returned, batch));
  }
  return rewards;
}

/** A longer time makes a timer of Node.js fire at once. */
const longestTimer = 2 ** 31 - 1;

interface Batch {
  readonly samples: readonly RewardSample[];
  /** Index of the first sample among all. */
  readonly begin: number;
}

async function call(reward: RewardFunction, { samples, begin }: Batch, options: RewardOptions): Promise<unknown> {
  const { timeoutSeconds, signal: outer } = options;
  const controller = new AbortController();
  const { promise: ended, reject } = withRejection();
  const stop = (reason: unknown) => {
    reject(reason);
    controller.abort(reason);
  };
  const interrupt = () => stop(outer!.reason);
  const timer = setTimeout(
    () => {
      const message = `did not answer within ${timeoutSeconds} s. Make it faster, or raise the reward's time-out`;
      stop(failure('REWARD_TIMEOUT', samples, begin, message, { timeoutSeconds }));
    },
    Math.min(timeoutSeconds * 1000, longestTimer),
  );
  outer?.addEventListener('abort', interrupt, { once: true });
  try {
    const answer = (async () => reward(samples, { signal: controller.signal }))();
    return await Promise.race([answer, ended]);
  } finally {
    clearTimeout(timer);
    outer?.removeEventListener('abort', interrupt);
  }
}

function withRejection(): { promise: Promise<never>; reject: (reason: unknown) => void } {
  let reject: (reason: unknown) => void = () => {};
  const promise = new Promise<never>((_, no) => {
    reject = no;
  });
  return { promise, reject };
}

/** Turns what a call threw into an error that names a sample. */
async function blame(error: unknown, reward: RewardFunction, batch: Batch, options: RewardOptions): Promise<never> {
  if (LockstepError.isInstance(error) || options.signal?.aborted) throw error;
  if (batch.samples.length > 1) {
    for (const [i, sample] of batch.samples.entries()) {
      const alone = { samples: [sample], begin: batch.begin + i };
      await call(reward, alone, options).catch((cause) => blame(cause, reward, alone, options));
    }
  }
  const reason = error instanceof Error ? error.message : String(error);
  throw failure('REWARD_THREW', batch.samples, batch.begin, `threw: ${reason}`, {}, error);
}

/** Expects one reward per sample, each of a shape and with finite numbers. */
function checked(returned: unknown, { samples, begin }: Batch): Reward[] {
  const count = Array.isArray(returned) ? returned.length : undefined;
  if (count !== samples.length) {
    const received = count === undefined ? describe(returned) : `${count} of them`;
    throw failure(
      'REWARD_COUNT',
      samples,
      begin,
      `must return an array of ${samples.length} rewards, but returned ${received}`,
      {
        expected: samples.length,
        received: count,
      },
    );
  }
  return (returned as unknown[]).map((value, i) => checkReward(value, samples[i]!, begin + i));
}

function checkReward(value: unknown, sample: RewardSample, index: number): Reward {
  const fail = (code: ErrorCode, problem: string) => failure(code, [sample], index, problem, { reward: value });
  const finite = (x: unknown, what: string) => {
    if (typeof x !== 'number') throw fail('REWARD_SHAPE', `returned ${describe(x)} as ${what}; expected a number`);
    if (!Number.isFinite(x)) throw fail('REWARD_NOT_FINITE', `returned ${x} as ${what}; return a finite number`);
  };
  const length = sample.tokens.length;
  if (Array.isArray(value)) {
    if (value.length !== length) {
      throw fail('REWARD_SHAPE', `returned ${value.length} token rewards for a response of ${length} tokens`);
    }
    for (const [t, x] of value.entries()) finite(x, `the reward of token ${t}`);
    return value;
  }
  if (typeof value !== 'object' || value === null) {
    finite(value, 'the reward');
    return value as number;
  }
  const { total, steps } = value as { total?: unknown; steps?: unknown };
  finite(total, 'total');
  if (!Array.isArray(steps)) throw fail('REWARD_SHAPE', `returned ${describe(steps)} as steps; expected an array`);
  let previous = 0;
  steps.forEach((step: Partial<RewardStep> | null, i) => {
    finite(step?.reward, `the reward of step ${i}`);
    const end = step?.end;
    if (!Number.isInteger(end) || end! <= previous || end! > length) {
      throw fail(
        'REWARD_SHAPE',
        `returned step ${i} with end ${end}; expected a whole number from ${previous + 1} to ${length}`,
      );
    }
    previous = end!;
  });
  return value as Reward;
}

function failure(
  code: ErrorCode,
  samples: readonly RewardSample[],
  index: number,
  problem: string,
  details: Record<string, unknown>,
  cause?: unknown,
): LockstepError {
  const { prompt, response } = samples[0]!;
  const which = samples.length > 1 ? `samples ${index} to ${index + samples.length - 1}` : `sample ${index}`;
  const first = `prompt ${excerpt(prompt)}, response ${excerpt(response)}`;
  const where = samples.length > 1 ? `the first: ${first}` : first;
  const facts = { sample: index, samples: samples.length, prompt, response, ...details };
  return new LockstepError(code, `The reward function, on ${which} (${where}), ${problem}.`, facts, { cause });
}

const excerpt = (text: string): string => JSON.stringify(text.length > 60 ? `${text.slice(0, 60)}…` : text);

function describe(value: unknown): string {
  if (value === undefined) return 'nothing';
  return Array.isArray(value) ? 'an array' : value === null ? 'null' : `a value of type ${typeof value}`;
}
