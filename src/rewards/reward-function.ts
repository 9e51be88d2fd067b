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

/** How a function is called, and named in errors. */
export interface CallOptions {
  /** For each call. A function that blocks its thread can only be stopped when it runs in one of its own (`openThread`). */
  readonly timeoutSeconds: number;
  readonly signal?: AbortSignal | undefined;
  /** What errors call the function; default: "The reward function". */
  readonly name?: string | undefined;
  /** Told before each call what it is about. */
  readonly onCall?: ((batch: Batch) => void) | undefined;
}

export interface RewardOptions extends CallOptions {
  /** Samples per call; all at once by default. */
  readonly batchSize?: number | undefined;
}

/** The samples of one call. */
export interface Batch {
  readonly samples: readonly RewardSample[];
  /** Index of the first sample among all. */
  readonly begin: number;
}

/** All samples in batches of `batchSize`, the last one with what is left; no samples are no batch. */
export function batchesOf(samples: readonly RewardSample[], batchSize = Math.max(samples.length, 1)): Batch[] {
  return Array.from({ length: Math.ceil(samples.length / batchSize) }, (_, i) => ({
    samples: samples.slice(i * batchSize, (i + 1) * batchSize),
    begin: i * batchSize,
  }));
}

/** Calls the function on all samples, batch after batch, and checks what it returns. Throws what `scoreBatch` does. */
export async function scoreSamples(
  reward: RewardFunction,
  samples: readonly RewardSample[],
  { batchSize, ...options }: RewardOptions,
): Promise<Reward[]> {
  const rewards: Reward[] = [];
  for (const batch of batchesOf(samples, batchSize)) rewards.push(...(await scoreBatch(reward, batch, options)));
  return rewards;
}

/**
 * One call, and a check of what it returns. Throws `REWARD_THREW`, `REWARD_TIMEOUT`, `REWARD_COUNT`, `REWARD_SHAPE` or
 * `REWARD_NOT_FINITE`, or under its own code the `LockstepError` that the function threw, naming the sample: when a batch of several
 * throws, its samples are tried one by one to find the one to name. An error with `details.sample` has named it already.
 */
export async function scoreBatch(reward: RewardFunction, batch: Batch, options: CallOptions): Promise<Reward[]> {
  options.signal?.throwIfAborted();
  const returned = await call(reward, batch, options).catch((error) => blame(error, reward, batch, options));
  return checkRewards(returned, batch, options.name);
}

/** A longer time makes a timer of Node.js fire at once; `AbortSignal.timeout` takes whole numbers only. */
const longestTimer = 2 ** 31 - 1;

export const timerMilliseconds = (seconds: number): number => Math.min(Math.ceil(seconds * 1000), longestTimer);

async function call(reward: RewardFunction, batch: Batch, options: CallOptions): Promise<unknown> {
  const { timeoutSeconds, signal: outer, onCall } = options;
  const controller = new AbortController();
  const { promise: ended, reject } = withRejection();
  const stop = (reason: unknown) => {
    reject(reason);
    controller.abort(reason);
  };
  const interrupt = () => stop(outer!.reason);
  const timer = setTimeout(() => stop(timeOut(batch, options)), timerMilliseconds(timeoutSeconds));
  outer?.addEventListener('abort', interrupt, { once: true });
  onCall?.(batch);
  try {
    const answer = (async () => reward(batch.samples, { signal: controller.signal }))();
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

export function timeOut(batch: Batch, { timeoutSeconds, name }: Pick<CallOptions, 'timeoutSeconds' | 'name'>) {
  const problem = `did not answer within ${timeoutSeconds} s. Make it faster, or raise the reward's timeoutSeconds`;
  return batchFailure('REWARD_TIMEOUT', batch, problem, { name, details: { timeoutSeconds } });
}

/** Turns what a call threw into an error that names a sample. */
async function blame(error: unknown, reward: RewardFunction, batch: Batch, options: CallOptions): Promise<never> {
  const known = LockstepError.isInstance(error) ? error : undefined;
  if (known?.details.sample !== undefined || options.signal?.aborted) throw error;
  if (batch.samples.length > 1) {
    for (const [i, sample] of batch.samples.entries()) {
      const alone = { samples: [sample], begin: batch.begin + i };
      await call(reward, alone, options).catch((cause) => blame(cause, reward, alone, options));
    }
  }
  const reason = (error instanceof Error ? error.message : String(error)).replace(/\.$/, '');
  const problem = known ? `failed: ${reason}` : `threw: ${reason}`;
  throw batchFailure(known?.code ?? 'REWARD_THREW', batch, problem, {
    name: options.name,
    ...(known ? { details: known.details } : {}),
    cause: error,
  });
}

/** Expects one reward per sample, each of a shape and with finite numbers. Throws `REWARD_COUNT` and what `checkReward` does. */
export function checkRewards(returned: unknown, batch: Batch, name?: string): Reward[] {
  const { samples, begin } = batch;
  const count = Array.isArray(returned) ? returned.length : undefined;
  if (count !== samples.length) {
    const received = count === undefined ? describe(returned) : `${count} of them`;
    const problem = `must return an array of ${samples.length} rewards, but returned ${received}`;
    const details = { expected: samples.length, received: count };
    throw batchFailure('REWARD_COUNT', batch, problem, { name, details });
  }
  return (returned as unknown[]).map((value, i) =>
    checkReward(value, { samples: [samples[i]!], begin: begin + i }, name),
  );
}

/** Throws `REWARD_SHAPE` or `REWARD_NOT_FINITE`. */
function checkReward(value: unknown, alone: Batch, name: string | undefined): Reward {
  const fail = (code: ErrorCode, problem: string) =>
    batchFailure(code, alone, problem, { name, details: { reward: value } });
  const finite = (x: unknown, what: string) => {
    if (typeof x !== 'number') throw fail('REWARD_SHAPE', `returned ${describe(x)} as ${what}; expected a number`);
    if (!Number.isFinite(x)) throw fail('REWARD_NOT_FINITE', `returned ${x} as ${what}; return a finite number`);
  };
  const { length } = alone.samples[0]!.tokens;
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

/** An error about the samples of a batch: `details.sample` is the index of the first. */
export function batchFailure(
  code: ErrorCode,
  { samples, begin }: Batch,
  problem: string,
  {
    name = 'The reward function',
    details = {},
    cause,
  }: { name?: string | undefined; details?: object; cause?: unknown },
): LockstepError {
  const { prompt, response } = samples[0]!;
  const which = samples.length > 1 ? `samples ${begin} to ${begin + samples.length - 1}` : `sample ${begin}`;
  const first = `prompt ${excerpt(prompt)}, response ${excerpt(response)}`;
  const where = samples.length > 1 ? `the first: ${first}` : first;
  const facts = { sample: begin, samples: samples.length, prompt, response, ...details };
  return new LockstepError(code, `${name}, on ${which} (${where}), ${problem}.`, facts, { cause });
}

const excerpt = (text: string): string => JSON.stringify(text.length > 60 ? `${text.slice(0, 60)}…` : text);

function describe(value: unknown): string {
  if (value === undefined) return 'nothing';
  return Array.isArray(value) ? 'an array' : value === null ? 'null' : `a value of type ${typeof value}`;
}
