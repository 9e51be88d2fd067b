/**
 * HTTP endpoint: POST `{"samples": [{prompt, response, tokens, row}]}`, answered by `{"rewards": [..]}`, one per sample and each a
 * number, a list with one number per token, or `{total, steps: [{end, reward}]}`.
 *
 * Batches go out `concurrency` at a time. Network errors, time-outs, 408, 429 and 5xx are tried again `retries` times, after
 * `backoffSeconds` doubled from try to try, or `Retry-After` when that is longer; other answers are errors at once. No redirect is
 * followed: only the configured URL is called.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { LockstepError } from '../../errors.js';
import {
  type Batch,
  batchesOf,
  batchFailure,
  checkRewards,
  type Reward,
  type RewardFunction,
  timerMilliseconds,
} from '../reward-function.js';

export interface HttpSettings {
  readonly url: string;
  /** Values may name environment variables as `${NAME}`, so that no file of the run holds a secret. */
  readonly headers: Readonly<Record<string, string>>;
  /** Samples per request. */
  readonly batchSize: number;
  /** Requests at a time. */
  readonly concurrency: number;
  /** Of each request. */
  readonly timeoutSeconds: number;
  /** Further tries of a request that failed. */
  readonly retries: number;
  /** Wait before the first of them; each later one is twice as long. */
  readonly backoffSeconds: number;
}

/** No wait is longer, and an endpoint that asks for a longer one has failed: the run would seem to hang. */
const longestWaitSeconds = 300;

/** Throws `REWARD_SETTINGS` for a header that names a variable which is not set. */
export function http(settings: HttpSettings): RewardFunction {
  const headers = { 'content-type': 'application/json', ...expanded(settings.headers) };
  return async (samples, { signal }) => {
    const batches = batchesOf(samples, settings.batchSize);
    const rewards: Reward[][] = [];
    const failed = new AbortController();
    const context = { settings, headers, signal: AbortSignal.any([signal, failed.signal]) };
    let next = 0;
    const send = async () => {
      while (next < batches.length) {
        const index = next++;
        rewards[index] = await request(batches[index]!, context);
      }
    };
    const senders = Array.from({ length: Math.min(settings.concurrency, batches.length) }, () =>
      send().catch((error: unknown) => {
        // The first failure ends the other requests, whose errors are its consequence.
        failed.abort(error);
        throw error;
      }),
    );
    const [first] = (await Promise.allSettled(senders)).filter(({ status }) => status === 'rejected');
    if (first) throw signal.aborted ? signal.reason : failed.signal.reason;
    return rewards.flat();
  };
}

interface Context {
  settings: HttpSettings;
  headers: Record<string, string>;
  signal: AbortSignal;
}

/** Why a try failed. */
interface Failure {
  what: string;
  code: 'REWARD_HTTP' | 'REWARD_TIMEOUT';
  status?: number;
  body?: string;
  retry: boolean;
  waitSeconds?: number;
  cause?: unknown;
}

async function request(batch: Batch, context: Context): Promise<Reward[]> {
  const { settings, signal } = context;
  const body = JSON.stringify({ samples: batch.samples.map(plainSample) });
  for (let attempt = 1; ; attempt++) {
    const answer = await attemptOnce(body, context);
    if ('text' in answer) return rewardsOf(answer.text, batch, settings.url);
    const backoff = Math.min(settings.backoffSeconds * 2 ** (attempt - 1), longestWaitSeconds);
    const wait = Math.max(backoff, answer.waitSeconds ?? 0);
    const over = attempt > settings.retries || wait > longestWaitSeconds;
    if (!answer.retry || over) throw endpointError(batch, context, answer, attempt);
    await sleep(timerMilliseconds(wait), undefined, { signal }).catch(() => signal.throwIfAborted());
  }
}

async function attemptOnce(body: string, { settings, headers, signal }: Context): Promise<{ text: string } | Failure> {
  const { url, timeoutSeconds } = settings;
  const timeout = AbortSignal.timeout(timerMilliseconds(timeoutSeconds));
  try {
    const options = { method: 'POST', headers, body, redirect: 'manual' } as const;
    const response = await fetch(url, { ...options, signal: AbortSignal.any([signal, timeout]) });
    const text = await response.text();
    return response.ok ? { text } : refusal(response, text);
  } catch (cause) {
    signal.throwIfAborted();
    if (timeout.aborted) {
      return { what: `did not answer within ${timeoutSeconds} s`, code: 'REWARD_TIMEOUT', retry: true, cause };
    }
    // fetch says only that it failed; the reason is its cause.
    const { message, cause: reason } = cause as Error;
    const why = reason instanceof Error ? reason.message || String((reason as { code?: unknown }).code) : message;
    return { what: `could not be reached: ${why}`, code: 'REWARD_HTTP', retry: true, cause };
  }
}

function refusal({ status, headers }: Response, body: string): Failure {
  const location = headers.get('location');
  const what =
    location !== null && status < 400 ? `answered ${status}, a redirect to ${location}` : `answered ${status}`;
  const waitSeconds = retryAfter(headers.get('retry-after'));
  const retry = status === 408 || status === 429 || status >= 500;
  return { what, code: 'REWARD_HTTP', status, body, retry, ...(waitSeconds === undefined ? {} : { waitSeconds }) };
}

/** Seconds of a `Retry-After` [RFC 9110, 10.2.3]: a number of seconds, or a date. */
function retryAfter(header: string | null): number | undefined {
  if (header === null) return undefined;
  const seconds = /^\d+$/.test(header.trim()) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, seconds) : undefined;
}

/** Checked to be one reward per sample, each of a shape and finite: JSON has no NaN, and text in its place is no number. */
function rewardsOf(text: string, batch: Batch, url: string): Reward[] {
  const name = `The reward endpoint ${url}`;
  let answer: unknown;
  try {
    answer = JSON.parse(text);
  } catch (cause) {
    const problem = `answered with what is not JSON: ${excerpt(text)}; expected {"rewards": [..]}`;
    throw batchFailure('REWARD_ANSWER', batch, problem, { name, details: { url, body: text }, cause });
  }
  if (typeof answer !== 'object' || answer === null || !('rewards' in answer)) {
    const problem = `answered ${excerpt(text)}; expected {"rewards": [..]} with one reward per sample`;
    throw batchFailure('REWARD_ANSWER', batch, problem, { name, details: { url, body: text } });
  }
  return checkRewards(answer.rewards, batch, name);
}

function endpointError(batch: Batch, { settings }: Context, failure: Failure, attempts: number): LockstepError {
  const { what, code, status, body, retry, waitSeconds = 0, cause } = failure;
  const { url } = settings;
  const times = attempts === 1 ? 'in 1 attempt' : `in ${attempts} attempts`;
  const said = body ? `: ${excerpt(body)}` : '';
  const asked = waitSeconds > longestWaitSeconds ? ` and asked to wait ${Math.ceil(waitSeconds)} s` : '';
  const advice = retry
    ? 'Check that it runs and has capacity (batchSize, concurrency), or raise retries or timeoutSeconds'
    : 'Check url and headers, and what the endpoint says';
  const details = { url, status, attempts, body };
  return batchFailure(code, batch, `${what} ${times}${asked}${said}. ${advice}`, {
    name: `The reward endpoint ${url}`,
    details,
    cause,
  });
}

const excerpt = (text: string): string => JSON.stringify(text.length > 200 ? `${text.slice(0, 200)}…` : text);

/** Typed arrays as lists; integers of a row that no number holds as text. */
function plainSample({ prompt, response, tokens, row }: Batch['samples'][number]): unknown {
  return { prompt, response, tokens: Array.from(tokens), row: plain(row) };
}

function plain(value: unknown): unknown {
  if (typeof value === 'bigint') return String(value);
  if (ArrayBuffer.isView(value) && !(value instanceof DataView))
    return Array.from(value as unknown as ArrayLike<number>);
  if (Array.isArray(value)) return value.map(plain);
  if (typeof value !== 'object' || value === null || value instanceof Date) return value;
  return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, plain(inner)]));
}

function expanded(headers: Readonly<Record<string, string>>): Record<string, string> {
  const entries = Object.entries(headers).map(([header, text]) => {
    const value = text.replace(/\$\{(\w+)\}/g, (_, variable: string) => {
      const found = process.env[variable];
      if (found !== undefined) return found;
      throw badHeader(header, `names the environment variable ${variable}, which is not set; set it before the run`);
    });
    try {
      new Headers([[header, value]]);
    } catch {
      // The reason that Headers gives would show the value.
      throw badHeader(header, 'is not a valid HTTP header; check its name, and its value for line breaks');
    }
    return [header.toLowerCase(), value] as const;
  });
  return Object.fromEntries(entries);
}

function badHeader(header: string, problem: string): LockstepError {
  return new LockstepError('REWARD_SETTINGS', `the reward endpoint's header ${JSON.stringify(header)} ${problem}`, {
    header,
  });
}
