/**
 * The generation loop: prompts in chunks, pages that run out, shared prompts, stop tokens, progress, ending early, aborting.
 * Nothing of it shows in a text (DESIGN §2). Freed pages are NaN throughout.
 */
import { describe, expect, test } from 'vitest';
import type { Generated, GenerateOptions, GenerateRequest } from '../../src/engine/engine.js';
import { LockstepError } from '../../src/errors.js';
import {
  budgetForPages,
  dtypes,
  generatedAsScored,
  instructionSets,
  pagesOf,
  randomModel,
  requestsOf,
  sameBits,
  sameGenerated,
  sampling,
  sequencesOf,
  smallShape,
  tinyShape,
  withEngine,
} from './support.js';

const tiny = randomModel('tiny', tinyShape);
const small = randomModel('small', smallShape);

const sameAll = (actual: readonly Generated[], expected: readonly Generated[], what: string) => {
  expect(actual.length).toBe(expected.length);
  for (const [i, one] of expected.entries()) sameGenerated(actual[i]!, one, `${what}: request ${i}`);
};

describe.each(dtypes)('prompts, %s', (dtype) => {
  test('longer than a step are read in chunks, beside sequences that decode', () =>
    withEngine(tiny, { dtype, poison: true }, async (engine) => {
      const prompts = sequencesOf(tinyShape, [3, 700, 1000, 40, 512, 513, 9, 600]);
      const generated = await engine.generate(requestsOf(prompts), sampling);
      const { steps, rows } = engine.lastGeneration!;
      expect(rows).toBe(prompts.reduce((sum, { length }) => sum + length + sampling.maxNewTokens - 1, 0));
      expect(steps).toBeGreaterThan(sampling.maxNewTokens);
      await generatedAsScored(engine, prompts, generated, sampling.temperature);
    }));

  test('of more requests than run together', () =>
    withEngine(tiny, { dtype, poison: true }, async (engine) => {
      const prompts = sequencesOf(
        tinyShape,
        Array.from({ length: 600 }, (_, i) => 1 + ((i * 13) % 9)),
      );
      const lengths = prompts.map((_, i) => 1 + ((i * 5) % 7));
      const requests = prompts.map((prompt, id) => ({ prompt, id, maxNewTokens: lengths[id]! }));
      const generated = await engine.generate(requests, sampling);
      expect(generated.map(({ tokens }) => tokens.length)).toEqual(lengths);
      await generatedAsScored(engine, prompts, generated, sampling.temperature);
    }));

  test('that are equal are read once', () =>
    withEngine(tiny, { dtype, poison: true }, async (engine) => {
      const [prompt, other] = sequencesOf(tinyShape, [150, 64]);
      const prompts = [prompt!, other!, prompt!, prompt!, other!, prompt!, prompt!];
      const requests = requestsOf(prompts);
      const generated = await engine.generate(requests, sampling);
      expect(engine.lastGeneration!.sharedPositions).toBe(4 * 149 + 63);
      await generatedAsScored(engine, prompts, generated, sampling.temperature);
      for (const [i, request] of requests.entries()) {
        const [alone] = await engine.generate([request], sampling);
        expect(engine.lastGeneration!.sharedPositions).toBe(0);
        sameGenerated(generated[i]!, alone!, `request ${i}`);
      }
      expect(new Set(generated.map(({ tokens }) => tokens.join())).size).toBe(prompts.length);
    }));

  test('give the same text in any parts that are the same, whatever computes', async () => {
    const prompts = sequencesOf(smallShape, [30, 2, 130]);
    for (const parts of [1, 8]) {
      const machines = [{}, { threads: 1 }, { threads: 3 }, ...instructionSets().map((isa) => ({ isa }))];
      let first: Generated[] | undefined;
      for (const machine of machines) {
        await withEngine(small, { dtype, parts, poison: true, ...machine }, async (engine) => {
          const generated = await engine.generate(requestsOf(prompts), { ...sampling, maxNewTokens: 12, topP: 0.95 });
          first ??= generated;
          sameAll(generated, first, JSON.stringify({ parts, ...machine }));
          await generatedAsScored(engine, prompts, generated, sampling.temperature);
        });
      }
    }
  });
});

describe('pages', () => {
  const prompts = sequencesOf(tinyShape, [10, 60, 100, 40, 10, 120, 5, 64, 63, 65]);
  const requests = requestsOf([...prompts, prompts[2]!, prompts[5]!, prompts[5]!]);
  const options = { ...sampling, maxNewTokens: 150 };
  const longest = pagesOf(120 + 150);

  test.each(dtypes)('that run out send sequences back, and change no text: %s', async (dtype) => {
    let plenty: Generated[] = [];
    const budgets: number[] = [];
    await withEngine(tiny, { dtype, poison: true }, async (engine, device) => {
      plenty = await engine.generate(requests, options);
      expect(engine.lastGeneration!.preemptions).toBe(0);
      const sizes = [longest, longest + 2, 2 * longest + 1, 4 * longest];
      budgets.push(...sizes.map((pages) => budgetForPages(engine, device.heldBytes, requests, pages)));
    });
    let preemptions = 0;
    for (const memoryBytes of budgets) {
      await withEngine(tiny, { dtype, poison: true, memoryBytes }, async (engine) => {
        sameAll(await engine.generate(requests, options), plenty, `${memoryBytes} bytes`);
        preemptions += engine.lastGeneration!.preemptions;
      });
    }
    expect(preemptions).toBeGreaterThan(0);
  });

  test('too few for one request are an error before anything runs', async () => {
    let memoryBytes = 0;
    await withEngine(tiny, { dtype: 'float32' }, async (engine, device) => {
      memoryBytes = budgetForPages(engine, device.heldBytes, requests, longest - 1);
    });
    await withEngine(tiny, { dtype: 'float32', memoryBytes }, async (engine) => {
      await expect(engine.generate(requests, options)).rejects.toMatchObject({
        code: 'KV_BUDGET',
        message: expect.stringMatching(new RegExp(`needs ${longest} pages .* holds ${longest - 1}`)),
      });
    });
  });
});

describe('speculation', () => {
  // A text that repeats what its prompt has, and answers to one prompt, give something to guess from.
  const [first, second, third] = sequencesOf(tinyShape, [9, 70, 5]);
  const repeated = Int32Array.from([...first!, ...first!, ...first!]);
  const prompts = [repeated, second!, third!, third!];
  const counts = [1, 2, 3, 7, 20];

  test.each(dtypes)('changes no text and no log-prob, greedy or sampled: %s', (dtype) =>
    withEngine(tiny, { dtype, poison: true }, async (engine) => {
      for (const temperature of [0, 0.02, 1]) {
        for (const requests of [requestsOf([repeated]), requestsOf(prompts)]) {
          const options = { ...sampling, temperature, maxNewTokens: 130 };
          const plain = await engine.generate(requests, options);
          const { steps } = engine.lastGeneration!;
          expect(engine.lastGeneration).toMatchObject({ guessed: 0, accepted: 0 });
          for (const speculation of counts) {
            sameAll(await engine.generate(requests, { ...options, speculation }), plain, `${speculation} guesses`);
            const { guessed, accepted, steps: fewer } = engine.lastGeneration!;
            expect(guessed).toBeGreaterThanOrEqual(accepted);
            if (temperature > 0.5) continue;
            expect(accepted).toBeGreaterThan(0);
            expect(fewer).toBeLessThan(steps);
            // One sequence alone: every step has its own token and those that were guessed.
            if (requests.length === 1) expect(fewer).toBe(steps - accepted);
          }
        }
      }
    }),
  );

  test('ends where a text without it ends: at stop tokens, the most tokens, the last position', () =>
    withEngine(tiny, { dtype: 'float32', poison: true }, async (engine) => {
      const near = Int32Array.from({ length: tinyShape.maxPositions - 40 }, (_, i) => first![i % 9]!);
      const requests = requestsOf([repeated, near]);
      const options = { ...sampling, temperature: 0, maxNewTokens: 100 };
      const free = await engine.generate(requests, options);
      const stopTokens = [free[0]!.tokens[60]!];
      for (const changed of [{}, { stopTokens }, { maxNewTokens: 1 }, { maxNewTokens: 61 }]) {
        const plain = await engine.generate(requests, { ...options, ...changed });
        sameAll(await engine.generate(requests, { ...options, ...changed, speculation: 5 }), plain, 'speculation 5');
      }
      expect(free[1]!.tokens.length).toBe(40);
    }));

  test('sends no sequence back for want of pages that only guesses need', async () => {
    const requests = requestsOf(prompts);
    const options = { ...sampling, temperature: 0, maxNewTokens: 150 };
    let plain: Generated[] = [];
    let memoryBytes = 0;
    await withEngine(tiny, { dtype: 'float32' }, async (engine, device) => {
      plain = await engine.generate(requests, options);
      memoryBytes = budgetForPages(engine, device.heldBytes, requests, pagesOf(70 + 150) + 2, 7);
    });
    await withEngine(tiny, { dtype: 'float32', poison: true, memoryBytes }, async (engine) => {
      sameAll(await engine.generate(requests, { ...options, speculation: 7 }), plain, 'few pages');
      expect(engine.lastGeneration!.preemptions).toBeGreaterThan(0);
      expect(engine.lastGeneration!.accepted).toBeGreaterThan(0);
    });
  });

  test('is for few sequences', () =>
    withEngine(tiny, { dtype: 'float32', poison: true }, async (engine) => {
      const requests = requestsOf(Array.from({ length: 12 }, () => repeated)).map((request, i) => ({
        ...request,
        maxNewTokens: i < 2 ? 60 : 30,
      }));
      const options = { ...sampling, temperature: 0 };
      const plain = await engine.generate(requests, options);
      const { steps } = engine.lastGeneration!;
      sameAll(await engine.generate(requests, { ...options, speculation: 3 }), plain, 'the last two');
      // While all run nothing is guessed, so those steps are as many.
      expect(engine.lastGeneration!.accepted).toBeGreaterThan(0);
      expect(engine.lastGeneration!.steps).toBeGreaterThan(30);
      expect(engine.lastGeneration!.steps).toBeLessThan(steps);
    }));

  test('is a whole number', () =>
    withEngine(tiny, { dtype: 'float32' }, async (engine) => {
      await expect(engine.generate(requestsOf(prompts), { ...sampling, speculation: 1.5 })).rejects.toMatchObject({
        code: 'SAMPLING_INVALID',
        message: expect.stringMatching(/speculation: expected a whole number/),
      });
    }));
});

describe('settings', () => {
  const prompts = sequencesOf(tinyShape, [12, 3, 40, 7]);
  const requests = requestsOf(prompts);
  const run = (requested: readonly GenerateRequest[], options: Partial<GenerateOptions> = {}) =>
    withEngine(tiny, { dtype: 'float32', poison: true }, (engine) =>
      engine.generate(requested, { ...sampling, ...options }),
    );

  test('temperature 0 takes the most probable token, whatever the seed', async () => {
    const greedy = await run(requests, { temperature: 0, seed: 1 });
    sameAll(await run(requests, { temperature: 0, seed: 2 }), greedy, 'another seed');
    await withEngine(tiny, { dtype: 'float32' }, async (engine) => {
      const text = Int32Array.from([...prompts[0]!, ...greedy[0]!.tokens]);
      const { logits } = await engine.forward(
        { tokens: text, lengths: Int32Array.of(text.length) },
        { outputs: ['logits'] },
      );
      const V = tinyShape.vocabulary;
      for (const [i, token] of greedy[0]!.tokens.entries()) {
        const t = prompts[0]!.length - 1 + i;
        const row = logits!.subarray(t * V, (t + 1) * V);
        expect(token).toBe(row.indexOf(Math.max(...row)));
      }
    });
  });

  test('top-k 1 is greedy at any temperature', async () => {
    const greedy = await run(requests, { temperature: 0 });
    const top = await run(requests, { topK: 1 });
    for (const [i, { tokens }] of greedy.entries()) sameBits(top[i]!.tokens, tokens, `request ${i}`);
  });

  test('top-k and top-p leave only the tokens they name', () =>
    withEngine(tiny, { dtype: 'float32', poison: true }, async (engine) => {
      const requested = requestsOf(Array.from({ length: 200 }, () => prompts[2]!));
      const { logits } = await engine.forward(
        { tokens: prompts[2]!, lengths: Int32Array.of(40) },
        { outputs: ['logits'] },
      );
      const last = [...logits!.subarray(39 * tinyShape.vocabulary)].map((logit, token) => ({
        p: Math.exp(logit),
        token,
      }));
      const total = last.reduce((sum, { p }) => sum + p, 0);
      const ranked = last.sort((a, b) => b.p - a.p);
      const firsts = async (options: Partial<GenerateOptions>) =>
        new Set(
          (await engine.generate(requested, { ...sampling, maxNewTokens: 1, ...options })).map((g) => g.tokens[0]!),
        );
      const topK = await firsts({ topK: 4 });
      expect([...topK].sort()).toEqual(
        ranked
          .slice(0, 4)
          .map(({ token }) => token)
          .sort(),
      );
      let mass = 0;
      const nucleus = ranked.filter(({ p }) => {
        const inside = mass < 0.5;
        mass += p / total;
        return inside;
      });
      for (const token of await firsts({ topP: 0.5 })) expect(nucleus.map((n) => n.token)).toContain(token);
      expect((await firsts({})).size).toBeGreaterThan(nucleus.length);
    }));

  test('seed and id make the text; the place among the requests does not', async () => {
    const base = await run(requests);
    const permuted = [2, 0, 3, 1];
    const moved = await run(permuted.map((i) => requests[i]!));
    for (const [to, from] of permuted.entries()) sameGenerated(moved[to]!, base[from]!, `request ${from}`);
    expect(await run(requests, { seed: 12 })).not.toEqual(base);
    const renamed = await run([{ ...requests[0]!, id: 99 }, requests[1]!]);
    expect(renamed[0]!.tokens).not.toEqual(base[0]!.tokens);
    sameGenerated(renamed[1]!, base[1]!, 'its neighbour');
    const wide = await run([{ ...requests[0]!, id: 2n ** 63n + 5n }], { seed: 2n ** 64n - 1n });
    expect(wide[0]!.tokens.length).toBe(sampling.maxNewTokens);
  });

  test('fewer new tokens are a prefix of more', async () => {
    const long = await run(requests);
    for (const maxNewTokens of [0, 1, 9]) {
      for (const [i, { tokens, finish }] of (await run(requests, { maxNewTokens })).entries()) {
        sameBits(tokens, long[i]!.tokens.subarray(0, maxNewTokens), `request ${i}`);
        expect(finish).toBe('length');
      }
    }
  });

  test('a stop token ends a text and is part of it', async () => {
    const free = await run(requests, { maxNewTokens: 60 });
    const stopTokens = [free[0]!.tokens[20]!, free[2]!.tokens[33]!];
    const stopped = await run(requests, { maxNewTokens: 60, stopTokens });
    for (const [i, { tokens, finish }] of stopped.entries()) {
      const end = free[i]!.tokens.findIndex((token) => stopTokens.includes(token));
      sameBits(tokens, free[i]!.tokens.subarray(0, end < 0 ? 60 : end + 1), `request ${i}`);
      expect(finish).toBe(end < 0 ? 'length' : 'stop');
    }
    expect(stopped[0]!.finish).toBe('stop');
  });

  test('a text ends where the positions of the model do', async () => {
    const [prompt] = sequencesOf(tinyShape, [tinyShape.maxPositions - 5]);
    const [end] = await run(requestsOf([prompt!]));
    expect(end!.tokens.length).toBe(5);
    expect(end!.finish).toBe('length');
    await expect(run([{ prompt: new Int32Array(tinyShape.maxPositions + 1), id: 0 }])).rejects.toMatchObject({
      code: 'PROMPT_TOO_LONG',
    });
    await expect(run([{ prompt: new Int32Array(0), id: 0 }])).rejects.toMatchObject({ code: 'PROMPT_TOO_LONG' });
    await expect(run([{ prompt: Int32Array.of(tinyShape.vocabulary), id: 0 }])).rejects.toMatchObject({
      code: 'TOKEN_OUT_OF_RANGE',
    });
    expect(await run([])).toEqual([]);
  });
});

describe('a caller', () => {
  const prompts = sequencesOf(smallShape, [20, 5, 33, 20, 7]);
  const requests = requestsOf([...prompts, prompts[0]!]);
  const options = { ...sampling, maxNewTokens: 200 };
  const withSmall = <T>(run: Parameters<typeof withEngine<T>>[2]) =>
    withEngine(small, { dtype: 'float32', poison: true }, run);

  test('sees every token once, in order', () =>
    withSmall(async (engine) => {
      const seen: number[][] = requests.map(() => []);
      let calls = 0;
      let total = 0;
      const generated = await engine.generate(requests, {
        ...options,
        onProgress: (progress) => {
          calls += 1;
          total += progress.tokens.length;
          expect(progress.tokens.length).toBe(progress.requests.length);
          expect(progress.tokens.length).toBeGreaterThan(0);
          expect(progress.total).toBe(total);
          for (const [i, token] of progress.tokens.entries()) seen[progress.requests[i]!]!.push(token);
          return undefined;
        },
      });
      expect(calls).toBeGreaterThan(1);
      for (const [i, { tokens }] of generated.entries()) sameBits(seen[i]!, tokens, `request ${i}`);
    }));

  test('ends requests early; the others go on with the same text', () =>
    withSmall(async (engine) => {
      const whole = await engine.generate(requests, options);
      const ended = await engine.generate(requests, { ...options, onProgress: () => [1, 3] });
      for (const [i, expected] of whole.entries()) {
        if (i !== 1 && i !== 3) {
          sameGenerated(ended[i]!, expected, `request ${i}`);
          continue;
        }
        const { tokens, logprobs, finish } = ended[i]!;
        expect(finish).toBe('aborted');
        expect(tokens.length).toBeLessThan(options.maxNewTokens);
        sameBits(tokens, expected.tokens.subarray(0, tokens.length), `request ${i}`);
        sameBits(logprobs, expected.logprobs.subarray(0, tokens.length), `request ${i}`);
      }
    }));

  test('aborts, and can go on afterwards', () =>
    withSmall(async (engine) => {
      const controller = new AbortController();
      const reason = new Error('enough');
      const running = engine.generate(requests, {
        ...options,
        maxNewTokens: 1000,
        signal: controller.signal,
        onProgress: () => {
          controller.abort(reason);
          return undefined;
        },
      });
      await expect(running).rejects.toBe(reason);
      await expect(engine.generate(requests, { ...options, signal: controller.signal })).rejects.toBe(reason);
      const [after] = await engine.generate([requests[1]!], { ...options, maxNewTokens: 3 });
      expect(after!.tokens.length).toBe(3);
    }));

  test('that throws in onProgress gets its own error', () =>
    withSmall(async (engine) => {
      const own = new TypeError('mine');
      let calls = 0;
      const running = engine.generate(requests, {
        ...options,
        onProgress: () => {
          calls += 1;
          throw own;
        },
      });
      await expect(running).rejects.toBe(own);
      expect(calls).toBe(1);
    }));

  test('gets errors of the library', () =>
    withSmall(async (engine) => {
      const error = await engine.generate([{ prompt: Int32Array.of(-1), id: 0 }], options).catch((e: unknown) => e);
      expect(LockstepError.isInstance(error)).toBe(true);
    }));
});
