/** Rewards of an HTTP endpoint: batches, retries, and failures that say what the endpoint did. */
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { afterEach, describe, expect, it } from 'vitest';
import { LockstepError } from '../../src/errors.js';
import type { HttpSettings } from '../../src/rewards/built-in/http.js';
import { rewardFunctions } from '../../src/rewards/built-in/registry.js';
import { type RewardSample, scoreSamples } from '../../src/rewards/reward-function.js';

const samples: RewardSample[] = Array.from({ length: 5 }, (_, i) => ({
  prompt: `p${i}`,
  response: `r${i}`,
  tokens: Int32Array.of(i, i + 1),
  row: { id: i, big: 2n ** 60n, list: Int32Array.of(1, 2), text: 'ä' },
}));

interface Received {
  samples: { prompt: string; response: string; tokens: number[]; row: Record<string, unknown> }[];
}
type Answer = (body: Received, response: ServerResponse, request: IncomingMessage) => void;

let server: Server | undefined;
afterEach(async () => {
  server?.closeAllConnections();
  await new Promise<void>((done) => (server ? server.close(() => done()) : done()));
  server = undefined;
});

/** A local endpoint. */
async function endpoint(answer: Answer): Promise<string> {
  server = createServer(async (request, response) => {
    const chunks: Buffer[] = [];
    for await (const chunk of request) chunks.push(chunk as Buffer);
    answer(JSON.parse(Buffer.concat(chunks).toString('utf8')) as Received, response, request);
  });
  await new Promise<void>((done) => server!.listen(0, '127.0.0.1', done));
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}/reward`;
}

const json = (response: ServerResponse, body: unknown, status = 200, headers = {}) => {
  response.writeHead(status, { 'content-type': 'application/json', ...headers });
  response.end(typeof body === 'string' ? body : JSON.stringify(body));
};
/** The id of each sample. */
const good: Answer = (body, response) => json(response, { rewards: body.samples.map(({ row }) => row.id) });

const settings = (url: string, changes: Partial<HttpSettings> = {}): HttpSettings => ({
  url,
  headers: {},
  batchSize: 2,
  concurrency: 1,
  timeoutSeconds: 20,
  retries: 2,
  backoffSeconds: 0.001,
  ...changes,
});
const score = (given: HttpSettings, options: { signal?: AbortSignal } = {}) =>
  scoreSamples(rewardFunctions.http(given), samples, { timeoutSeconds: 30, ...options });

async function failure(promise: Promise<unknown>): Promise<LockstepError> {
  const error = await promise.then(
    () => undefined,
    (reason) => reason,
  );
  expect(LockstepError.isInstance(error), String(error)).toBe(true);
  return error as LockstepError;
}

describe('an endpoint', () => {
  it('receives batches of samples as the contract says, and its rewards keep their order', async () => {
    const received: Received[] = [];
    const url = await endpoint((body, response, request) => {
      received.push(body);
      expect([request.method, request.headers['content-type']]).toEqual(['POST', 'application/json']);
      good(body, response, request);
    });
    expect(await score(settings(url))).toEqual([0, 1, 2, 3, 4]);
    expect(received.map((body) => body.samples.length)).toEqual([2, 2, 1]);
    expect(received[0]!.samples[1]).toEqual({
      prompt: 'p1',
      response: 'r1',
      tokens: [1, 2],
      row: { id: 1, big: String(2n ** 60n), list: [1, 2], text: 'ä' },
    });
  });

  it('is called at most `concurrency` times at once', async () => {
    let open = 0;
    let most = 0;
    const waiting: (() => void)[] = [];
    const url = await endpoint((body, response, request) => {
      most = Math.max(most, ++open);
      waiting.push(() => {
        open--;
        good(body, response, request);
      });
      // The last one to come lets all go: a caller that sends less than it may would wait for ever.
      if (waiting.length === 2 || body.samples[0]!.row.id === 4) for (const go of waiting.splice(0)) go();
    });
    expect(await score(settings(url, { batchSize: 1, concurrency: 2 }))).toEqual([0, 1, 2, 3, 4]);
    expect(most).toBe(2);
  });

  it('may give rewards of tokens and steps', async () => {
    const steps = { total: 1, steps: [{ end: 2, reward: 1 }] };
    const url = await endpoint(({ samples: { length } }, response) =>
      json(response, { rewards: length === 2 ? [[1, 2], steps] : [3] }),
    );
    expect(await score(settings(url))).toEqual([[1, 2], steps, [1, 2], steps, 3]);
  });

  it('gets headers, with environment variables in them', async () => {
    process.env.LOCKSTEP_TEST_TOKEN = 'secret';
    let authorization: string | undefined;
    const url = await endpoint((body, response, request) => {
      authorization = request.headers.authorization;
      good(body, response, request);
    });
    // biome-ignore lint/suspicious/noTemplateCurlyInString: the setting's own syntax
    const headers = { Authorization: 'Bearer ${LOCKSTEP_TEST_TOKEN}' };
    await score(settings(url, { headers }));
    expect(authorization).toBe('Bearer secret');
    delete process.env.LOCKSTEP_TEST_TOKEN;
    expect(() => rewardFunctions.http(settings(url, { headers }))).toThrow(/LOCKSTEP_TEST_TOKEN, which is not set/);
    const broken = { headers: { 'x-key': 'hidden\nvalue' } };
    expect(() => rewardFunctions.http(settings(url, broken))).toThrow(/"x-key" is not a valid HTTP header/);
    expect(() => rewardFunctions.http(settings(url, broken))).not.toThrow(/hidden/);
  });
});

describe('a request is tried again', () => {
  it.each([500, 503, 429, 408])('after %s', async (status) => {
    let calls = 0;
    const url = await endpoint((body, response, request) =>
      ++calls <= 2 ? json(response, 'busy', status) : good(body, response, request),
    );
    expect(await score(settings(url))).toEqual([0, 1, 2, 3, 4]);
    expect(calls).toBe(5);
  });

  it('after a broken connection and after a time-out', async () => {
    let calls = 0;
    const url = await endpoint((body, response, request) => {
      calls++;
      if (calls === 1) request.destroy();
      else if (calls !== 2) good(body, response, request);
    });
    expect(await score(settings(url, { timeoutSeconds: 1 }))).toEqual([0, 1, 2, 3, 4]);
    expect(calls).toBe(5);
  });

  it('not before the time of Retry-After', async () => {
    let calls = 0;
    const controller = new AbortController();
    const url = await endpoint((_, response) => {
      calls++;
      json(response, '', 429, { 'retry-after': '200' });
      setTimeout(() => controller.abort(new Error('still waiting')), 200);
    });
    // Without the wait all tries would be over long before, and their failure the error.
    await expect(score(settings(url), { signal: controller.signal })).rejects.toThrow('still waiting');
    expect(calls).toBe(1);
  });

  it('no more than `retries` times; the error has status, attempts and what was said', async () => {
    let calls = 0;
    const url = await endpoint((_, response) => {
      calls++;
      json(response, `overloaded ${'x'.repeat(500)}`, 503);
    });
    const error = await failure(score(settings(url)));
    expect(calls).toBe(3);
    expect(error).toMatchObject({
      code: 'REWARD_HTTP',
      details: { url, status: 503, attempts: 3, sample: 0, samples: 2 },
    });
    expect(error.message).toMatch(
      /The reward endpoint http.*, on samples 0 to 1 .*answered 503 in 3 attempts: "overloaded x/,
    );
    expect(error.message).toMatch(/Check that it runs/);
    expect(error.message.length).toBeLessThan(700);
  });

  it('not when it asks for a wait that would seem a hang', async () => {
    const url = await endpoint((_, response) => json(response, '', 503, { 'retry-after': '86400' }));
    expect((await failure(score(settings(url)))).message).toContain('in 1 attempt and asked to wait 86400 s');
    await new Promise<void>((done) => server!.close(() => done()));
    const date = new Date(Date.now() + 3_600_000).toUTCString();
    const later = await endpoint((_, response) => json(response, '', 503, { 'retry-after': date }));
    expect((await failure(score(settings(later)))).message).toMatch(/asked to wait 3(600|59\d) s/);
  });
});

describe('an error at once', () => {
  it.each([400, 401, 404, 422])('is %s', async (status) => {
    let calls = 0;
    const url = await endpoint((_, response) => {
      calls++;
      json(response, { detail: 'wrong key' }, status);
    });
    const error = await failure(score(settings(url)));
    expect(calls).toBe(1);
    expect(error).toMatchObject({ code: 'REWARD_HTTP', details: { status, attempts: 1 } });
    expect(error.message).toContain('wrong key');
  });

  it('is a redirect: only the configured URL is called', async () => {
    let calls = 0;
    const url = await endpoint((_, response) => {
      calls++;
      json(response, '', 307, { location: 'http://127.0.0.1:1/other' });
    });
    expect((await failure(score(settings(url)))).message).toContain('a redirect to http://127.0.0.1:1/other');
    expect(calls).toBe(1);
  });

  it.each<[string, unknown, string, RegExp]>([
    ['text', 'fine', 'REWARD_ANSWER', /not JSON: "fine"/],
    ['NaN', '{"rewards": [NaN, 1]}', 'REWARD_ANSWER', /not JSON/],
    ['a list', [1, 2], 'REWARD_ANSWER', /expected \{"rewards"/],
    ['null', null, 'REWARD_ANSWER', /expected \{"rewards"/],
    ['too few', { rewards: [1] }, 'REWARD_COUNT', /array of 2 rewards, but returned 1/],
    ['NaN as text', { rewards: [1, 'NaN'] }, 'REWARD_SHAPE', /sample 1 .*type string/],
    ['null rewards', { rewards: [null, 1] }, 'REWARD_SHAPE', /sample 0 .*null/],
    ['infinity', '{"rewards": [1e999, 1]}', 'REWARD_NOT_FINITE', /Infinity/],
    ['too many token rewards', { rewards: [1, [1, 2, 3]] }, 'REWARD_SHAPE', /3 token rewards/],
  ])('is an answer of %s', async (_, body, code, message) => {
    let calls = 0;
    const url = await endpoint((__, response) => {
      calls++;
      json(response, typeof body === 'string' ? body : JSON.stringify(body));
    });
    const error = await failure(score(settings(url)));
    expect(error.code).toBe(code);
    expect(error.message).toMatch(message);
    expect(error.message).toContain(`The reward endpoint ${url}`);
    expect(calls).toBe(1);
  });
});

it('an endpoint that never answers is a time-out', async () => {
  const url = await endpoint(() => {});
  const error = await failure(score(settings(url, { timeoutSeconds: 0.1, retries: 1 })));
  expect(error).toMatchObject({ code: 'REWARD_TIMEOUT', details: { attempts: 2 } });
  expect(error.message).toContain('did not answer within 0.1 s in 2 attempts');
});

it('a time-out may be any number of seconds', async () => {
  const url = await endpoint(good);
  expect(await score(settings(url, { timeoutSeconds: 2.01 }))).toEqual([0, 1, 2, 3, 4]);
});

it('an endpoint that is not there is named with the reason', async () => {
  const url = await endpoint(good);
  await new Promise((done) => server!.close(done));
  server = undefined;
  const error = await failure(score(settings(url, { retries: 1 })));
  expect(error).toMatchObject({ code: 'REWARD_HTTP', details: { attempts: 2 } });
  expect(error.message).toMatch(/could not be reached: .*ECONNREFUSED/);
});

it('an abort ends requests and waits', async () => {
  const url = await endpoint((_, response) => json(response, '', 503));
  for (const reached of [url, 'http://127.0.0.1:9/']) {
    const controller = new AbortController();
    const scoring = score(settings(reached, { backoffSeconds: 100 }), { signal: controller.signal });
    setTimeout(() => controller.abort(new Error('stop')), 50);
    await expect(scoring).rejects.toThrow('stop');
  }
});

it('the first request that fails ends the others', async () => {
  let closed = 0;
  const url = await endpoint((body, response, request) => {
    if (body.samples[0]!.row.id === 4) json(response, 'no', 400);
    else request.socket.once('close', () => closed++);
  });
  const error = await failure(score(settings(url, { concurrency: 3 })));
  expect(error).toMatchObject({ details: { status: 400, sample: 4 } });
  await expect.poll(() => closed).toBe(2);
});
