/**
 * Random programs over random pools against the same program run call by call: no deadlock, the same answers, and an abort or a
 * failure at any point ends them with nothing left behind.
 */
import { setTimeout as delay } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { callSignal } from '../../src/cluster/call-context.js';
import type { Future } from '../../src/cluster/future.js';
import { ResourcePools } from '../../src/cluster/resource-pools.js';
import { philox } from '../../src/data/sampler.js';

/** Call i of a program: where it runs, which earlier calls' answers it takes, how long it takes. */
interface Step {
  pool: number;
  inputs: number[];
  milliseconds: number;
  /** Whether the controller awaits it before it goes on. */
  awaited: boolean;
}

interface Program {
  pools: number;
  steps: Step[];
}

function randomProgram(seed: number): Program {
  let draws = 0;
  const below = (n: number) => philox([seed, 1], [draws++, 0, 0, 0])[0]! % n;
  const pools = 1 + below(4);
  const steps = Array.from({ length: 4 + below(12) }, (_, i) => ({
    pool: below(pools),
    inputs: i === 0 ? [] : Array.from({ length: below(3) }, () => below(i)),
    milliseconds: below(3),
    awaited: below(5) === 0,
  }));
  return { pools, steps };
}

const answerOf = (i: number, inputs: readonly number[]) => inputs.reduce((sum, x) => (31 * sum + x) % 65521, i + 1);

/** One call after the other. */
function oracle({ steps }: Program): number[] {
  const answers: number[] = [];
  for (const [i, { inputs }] of steps.entries()) {
    answers.push(
      answerOf(
        i,
        inputs.map((input) => answers[input]!),
      ),
    );
  }
  return answers;
}

class Runner {
  readonly running = new Set<string>();
  readonly order: number[][];
  readonly pools: ResourcePools;
  readonly #calls;

  constructor(
    readonly program: Program,
    options: { signal?: AbortSignal; fails?: number } = {},
  ) {
    const names = Array.from({ length: program.pools }, (_, i) => `pool ${i}`);
    this.order = names.map(() => []);
    this.pools = ResourcePools.create(
      names.map((name) => ({ name, devices: [name] })),
      options.signal ? { signal: options.signal } : {},
    );
    this.#calls = names.map((name, pool) => {
      const call = async (i: number, ...inputs: number[]): Promise<number> => {
        expect([...this.running]).not.toContain(name);
        this.running.add(name);
        this.order[pool]!.push(i);
        try {
          await delay(program.steps[i]!.milliseconds, undefined, { signal: callSignal()! });
          if (options.fails === i) throw new Error(`call ${i}`);
          return answerOf(i, inputs);
        } finally {
          this.running.delete(name);
        }
      };
      return this.pools.get(name).place(name, { call }, { call: 'call' });
    });
  }

  run(): Promise<number[]> {
    return this.pools.supervise(async () => {
      const futures: Future<number>[] = [];
      for (const [i, { pool, inputs, awaited }] of this.program.steps.entries()) {
        futures.push(this.#calls[pool]!.call(i, ...inputs.map((input) => futures[input]!)));
        if (awaited) await futures[i];
      }
      return Promise.all(futures);
    });
  }
}

const ascending = (numbers: readonly number[]) => numbers.every((x, i) => i === 0 || numbers[i - 1]! < x);
const seeds = Array.from({ length: 60 }, (_, seed) => seed);

describe('random programs', () => {
  it('give the answers of the program run call by call, each pool in call order', async () => {
    await Promise.all(
      seeds.map(async (seed) => {
        const program = randomProgram(seed);
        const runner = new Runner(program);
        expect([seed, await runner.run()]).toEqual([seed, oracle(program)]);
        const own = (pool: number) => program.steps.flatMap((step, i) => (step.pool === pool ? [i] : []));
        expect(runner.order).toEqual(runner.order.map((_, pool) => own(pool)));
      }),
    );
  });

  it('end with the error of the call that fails, whichever it is, and leave nothing running', async () => {
    await Promise.all(
      seeds.map(async (seed) => {
        const program = randomProgram(seed);
        const fails = seed % program.steps.length;
        const runner = new Runner(program, { fails });
        await expect(runner.run()).rejects.toMatchObject({
          code: 'WORKER_FAILED',
          message: `pool ${program.steps[fails]!.pool}.call: call ${fails}`,
        });
        await runner.pools.close();
        expect([...runner.running]).toEqual([]);
        expect(runner.order.every(ascending)).toBe(true);
      }),
    );
  });

  it('end at once with the reason of an abort, whenever it comes, and leave nothing running', async () => {
    let cancelled = 0;
    await Promise.all(
      seeds.map(async (seed) => {
        const controller = new AbortController();
        const program = randomProgram(seed);
        const runner = new Runner(program, { signal: controller.signal });
        const outcome = runner.run().catch((error: unknown) => error);
        // After some turns of the event loop, from none on.
        for (let turn = 0; turn < (seed % 20) - 1; turn++) await delay(1);
        controller.abort();
        const result = await outcome;
        if (Array.isArray(result)) expect(result).toEqual(oracle(program));
        else expect(result).toBe(controller.signal.reason);
        cancelled += Number(!Array.isArray(result));
        await runner.pools.close();
        expect([...runner.running]).toEqual([]);
      }),
    );
    expect(cancelled).toBeGreaterThan(seeds.length / 4);
  });
});
