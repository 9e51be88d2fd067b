/** Laws of pools and futures: order inside a pool, concurrency across pools, data that the controller never holds, failure. */
import { setTimeout as delay } from 'node:timers/promises';
import { describe, expect, expectTypeOf, it } from 'vitest';
import { callProgress, callSignal } from '../../src/cluster/call-context.js';
import { type Future, heldOf, type Materialised } from '../../src/cluster/future.js';
import { ResourcePool, type ResourcePoolOptions } from '../../src/cluster/resource-pool.js';
import { ResourcePools } from '../../src/cluster/resource-pools.js';
import { Shards } from '../../src/cluster/rows.js';
import { WorkerGroup } from '../../src/cluster/worker-group.js';
import { LockstepError } from '../../src/errors.js';
import { countingWorkers, degrees } from './counting-worker.js';

const pool = (name: string, options: Partial<ResourcePoolOptions> = {}) =>
  ResourcePool.create({ name, devices: [name], ...options });

/** Answers when it is told to; keeps a log of begins and ends. */
class Gate {
  readonly log: string[] = [];
  readonly #open = new Map<string, (fail?: unknown) => void>();

  async pass(name: string, ...inputs: unknown[]): Promise<string> {
    this.log.push(`${name} begins`);
    await new Promise<void>((resolve, reject) => {
      this.#open.set(name, (fail) => (fail === undefined ? resolve() : reject(fail)));
      callSignal()?.addEventListener('abort', () => this.log.push(`${name} released`));
    });
    this.log.push(`${name} ends`);
    return [name, ...inputs].join(' ');
  }

  async end(name: string, fail?: unknown): Promise<void> {
    while (!this.#open.has(name)) await delay(1);
    this.#open.get(name)!(fail);
    await delay(1);
  }

  begun = async (name: string): Promise<void> => {
    while (!this.log.includes(`${name} begins`)) await delay(1);
  };
}

const errorOf = async (promise: PromiseLike<unknown>): Promise<LockstepError> => {
  const error = await Promise.resolve(promise).then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(LockstepError.isInstance(error)).toBe(true);
  return error as LockstepError;
};

describe('a pool', () => {
  it('runs its calls one after the other in the order in which they were made, also after a failure', async () => {
    const gate = new Gate();
    const place = pool('p').place('w', gate, { pass: 'pass' });
    const other = pool('q').place('w', gate, { pass: 'pass' });
    const late = other.pass('late');
    const calls = [place.pass('a', late), place.pass('b'), place.pass('c')];
    await delay(5);
    // b has all its inputs, and waits for a, which waits for its own.
    expect(gate.log).toEqual(['late begins']);
    await gate.end('late');
    await gate.end('a', new Error('broken'));
    await gate.end('b');
    await gate.end('c');
    expect((await Promise.allSettled(calls)).map(({ status }) => status)).toEqual([
      'rejected',
      'fulfilled',
      'fulfilled',
    ]);
    expect(gate.log.slice(2)).toEqual(['a begins', 'b begins', 'b ends', 'c begins', 'c ends']);
  });

  it('runs beside another: both are in the middle of a call at the same time', async () => {
    const gate = new Gate();
    const [one, two] = [pool('p').place('w', gate, { pass: 'pass' }), pool('q').place('w', gate, { pass: 'pass' })];
    const calls = [one.pass('a'), two.pass('b')];
    await gate.begun('a');
    await gate.begun('b');
    await gate.end('b');
    await gate.end('a');
    expect(await Promise.all(calls)).toEqual(['a', 'b']);
    expect(gate.log).toEqual(['a begins', 'b begins', 'b ends', 'a ends']);
  });

  it('brings what a phase needs before its work, in turn', async () => {
    const log: string[] = [];
    const around = async <T>(phase: string, work: () => Promise<T>): Promise<T> => {
      log.push(`enter ${phase}`);
      await delay(1);
      return work().finally(() => log.push(`leave ${phase}`));
    };
    const p = pool('p', { around });
    const worker = p.place('w', { run: async () => log.push('run') }, { run: 'phase' });
    await Promise.all([worker.run(), p.turn(async () => log.push('hold')), worker.run()]);
    const call = ['enter phase', 'run', 'leave phase'];
    expect(log).toEqual([...call, 'hold', ...call]);
  });

  it('leaves other methods and fields of a worker as they are', async () => {
    class Counter {
      #n = 0;
      add = (n: number) => (this.#n += n);
      get n() {
        return this.#n;
      }
      double(): number {
        return 2 * this.#n;
      }
    }
    const counter = pool('p').place('c', new Counter(), { add: 'add' });
    expectTypeOf(counter.double).returns.toEqualTypeOf<number>();
    expectTypeOf(counter.add).returns.toEqualTypeOf<Future<number>>();
    expect([await counter.add(2), await counter.add(Promise.resolve(3)), counter.n, counter.double()]).toEqual([
      ...[2, 5, 5, 10],
    ]);
  });

  it('refuses calls from inside a call, which could wait for each other', async () => {
    const p = pool('p');
    const inner = p.place('inner', { run: async () => 1 }, { run: 'run' });
    const outer = pool('q').place('outer', { run: async () => inner.run() }, { run: 'run' });
    expect(await errorOf(outer.run())).toMatchObject({
      code: 'POOL_NESTED',
      message: expect.stringContaining('outer.run called inner.run of pool p'),
    });
    expect(await inner.run()).toBe(1);
  });

  it('refuses to be made without devices, with one twice, or with a method that a worker lacks', () => {
    const refuse = (make: () => unknown, message: RegExp) =>
      expect(make).toThrow(expect.objectContaining({ code: 'POOL_INVALID', message: expect.stringMatching(message) }));
    refuse(() => pool('p', { devices: [] }), /Pool p has no devices/);
    refuse(() => pool('p', { devices: [0, 1, 0] }), /Pool p has device 0 twice/);
    refuse(() => pool('p').place('w', {} as { run(): void }, { run: 'run' }), /Worker w of pool p has no method run/);
  });
});

it('pools that share a device or a name are refused', () => {
  const make = (...pools: { name: string; devices: number[] }[]) => ResourcePools.create(pools);
  expect(make({ name: 'a', devices: [0, 1] }, { name: 'b', devices: [2] }).get('b').devices).toEqual([2]);
  const overlap = { code: 'POOL_OVERLAP', message: expect.stringMatching(/Device 1 is in the pools a and b/) };
  expect(() => make({ name: 'a', devices: [0, 1] }, { name: 'b', devices: [2, 1] })).toThrow(
    expect.objectContaining(overlap),
  );
  const exists = expect.objectContaining({ code: 'POOL_EXISTS' });
  expect(() => make({ name: 'a', devices: [0] }, { name: 'a', devices: [1] })).toThrow(exists);
  const unknown = expect.objectContaining({ code: 'POOL_UNKNOWN', message: expect.stringContaining('one of a') });
  expect(() => make({ name: 'a', devices: [0] }).get('c')).toThrow(unknown);
});

describe('a future', () => {
  const told: Materialised[] = [];
  const onMaterialise = (what: Materialised) => told.push(what);
  const rollout = { tokens: Int32Array.of(1, 2, 3), lengths: Int32Array.of(1, 2), name: 'r' };

  it('passed to another call is not materialised, and its data is the very same', async () => {
    told.length = 0;
    const seen: unknown[] = [];
    const source = pool('p', { onMaterialise }).place('actor', { make: async () => rollout }, { make: 'make' });
    const sink = pool('q', { onMaterialise }).place(
      'critic',
      { take: async (batch: typeof rollout) => void seen.push(batch) },
      { take: 'take' },
    );
    const future = source.make();
    await sink.take(future);
    expect(seen[0]).toBe(rollout);
    expect(told).toEqual([{ label: 'critic.take', bytes: 0 }]);
  });

  it('awaited is reported once, with the bytes of its arrays', async () => {
    told.length = 0;
    const worker = pool('p', { onMaterialise }).place('actor', { make: async () => rollout }, { make: 'make' });
    const future = worker.make();
    expect(told).toEqual([]);
    expect(await Promise.all([future, future.finally(() => undefined)])).toEqual([rollout, rollout]);
    expect(told).toEqual([{ label: 'actor.make', bytes: 20 }]);
  });

  it('counts the arrays of objects in lists, however deep', async () => {
    told.length = 0;
    const list = [rollout, { inner: [{ logprobs: Float32Array.of(1, 2) }, null, 'text'] }];
    await pool('p', { onMaterialise })
      .place('actor', { make: async () => list }, { make: 'make' })
      .make();
    expect(told).toEqual([{ label: 'actor.make', bytes: 28 }]);
  });

  it('of a group stays in parts for a group, is joined for a single worker, and for the controller', async () => {
    told.length = 0;
    const group = (name: string, workers = countingWorkers<Float32Array>(2)) => ({
      workers,
      group: WorkerGroup.create({
        name,
        layout: degrees(1, 1, 2),
        worker: workers,
        protocols: { scale: 'DP_PROTO', echo: 'DP_PROTO' },
      }),
    });
    const [one, two] = [group('one'), group('two')];
    const p = pool('p', { onMaterialise }).place('one', one.group, { scale: 'scale' });
    const q = pool('q', { onMaterialise }).place('two', two.group, { echo: 'echo' });
    const alone = pool('r').place('alone', { sum: (x: Float32Array) => x.reduce((a, b) => a + b, 0) }, { sum: 'sum' });
    const doubled = p.scale(Float32Array.of(1, 2, 3), { factor: 2 });
    const echoed = q.echo(doubled);
    expect(await alone.sum(doubled)).toBe(12);
    const parts = (await heldOf(doubled)) as Shards<Float32Array>;
    expect(parts).toBeInstanceOf(Shards);
    await heldOf(echoed);
    two.workers.forEach(({ received }, rank) => {
      expect(received[0]).toBe(parts.parts[rank]);
    });
    expect(told).toEqual([]);
    expect(await echoed).toEqual(Float32Array.of(2, 4, 6));
    expect(told).toEqual([{ label: 'two.echo', bytes: 12 }]);
    // Without pools between them groups pass futures on in parts, too.
    await two.group.echo(one.group.echo(Float32Array.of(7, 8)));
    expect(two.workers[1]!.received.at(-1)).toBe(one.workers[1]!.received.at(-1));
  });

  it('that fails unawaited crashes nothing, and fails what depends on it with the same error', async () => {
    const p = pool('p').place(
      'w',
      { fail: () => Promise.reject(new Error('broken')), take: (x: unknown) => x },
      {
        ...{ fail: 'fail', take: 'take' },
      },
    );
    p.fail();
    const failed = p.fail();
    const error = await errorOf(p.take(failed));
    expect(error.message).toBe('w.fail: broken');
    await expect(failed).rejects.toBe(error);
  });
});

describe('failing', () => {
  const pools = (options: Partial<ResourcePoolOptions> = {}) =>
    ResourcePools.create(
      [
        { name: 'p', devices: [0] },
        { name: 'q', devices: [1] },
      ],
      options,
    );

  it('names worker, method, rank and sample, and keeps code, details and cause', async () => {
    const cause = new LockstepError('REWARD_NOT_FINITE', 'NaN', { sample: 3, rank: 1, score: Number.NaN });
    const p = pool('p').place('reward', { score: () => Promise.reject(cause) }, { score: 'score' });
    const error = await errorOf(p.score());
    expect(error).toMatchObject({
      code: 'REWARD_NOT_FINITE',
      message: 'reward.score, rank 1, sample 3: NaN',
      details: { pool: 'p', worker: 'reward', method: 'score', rank: 1, sample: 3, score: Number.NaN },
      cause,
    });
  });

  it('names what fails on ranks of a group, and what is no error of the library', async () => {
    const group = WorkerGroup.create({
      name: 'g',
      layout: degrees(1, 1, 2),
      worker: ({ rank }) => ({
        run: (rows: number[]) => {
          if (rank === 1) throw new LockstepError('MISMATCH', 'differs', { sequence: 5 });
          return rows;
        },
      }),
      protocols: { run: 'DP_PROTO' },
    });
    const placed = pool('p').place('critic', group, { run: 'run' });
    const error = await errorOf(placed.run([1, 2]));
    expect(error).toMatchObject({ code: 'RANK_FAILED', details: { worker: 'critic', rank: 1, sample: 5 } });
    expect(error.message).toMatch(/^critic\.run, rank 1, sample 5: g\.run failed on 1 of 2 ranks/);
    const thrower = pool('p').place('w', { run: () => Promise.reject('a text') }, { run: 'run' });
    expect(await errorOf(thrower.run())).toMatchObject({ code: 'WORKER_FAILED', message: 'w.run: a text' });
  });

  it('ends the iteration everywhere: running calls are released, waiting ones never begin', async () => {
    const gate = new Gate();
    const all = pools();
    const p = all.get('p').place('p', gate, { pass: 'pass' });
    const q = all.get('q').place('q', gate, { pass: 'pass' });
    const iteration = all.supervise(async () => {
      const running = q.pass('running');
      q.pass('behind');
      p.pass('fails');
      return running;
    });
    const failure = errorOf(iteration);
    await gate.begun('running');
    await gate.end('fails', new Error('broken'));
    const error = await failure;
    expect(error.message).toBe('p.pass: broken');
    expect(gate.log).toEqual(['running begins', 'fails begins', 'running released']);
    // The next iteration waits until what was released has left the devices.
    const next = all.supervise(async () => [await p.pass('next p'), await q.pass('next q')]);
    await gate.end('next p');
    expect(gate.log).not.toContain('next q begins');
    await gate.end('running');
    await gate.end('next q');
    expect(await next).toEqual(['next p', 'next q']);
    expect(gate.log).not.toContain('behind begins');
  });

  it('is the iteration’s also when nobody awaits the call, or the controller fails itself', async () => {
    const gate = new Gate();
    const all = pools();
    const p = all.get('p').place('w', gate, { pass: 'pass' });
    const unawaited = errorOf(all.supervise(async () => void p.pass('a')));
    await gate.end('a', new Error('broken'));
    expect((await unawaited).message).toBe('w.pass: broken');
    const controller = all.supervise(async () => {
      p.pass('b');
      await gate.begun('b');
      throw new LockstepError('REWARD_ON_GAP', 'gap');
    });
    expect((await errorOf(controller)).code).toBe('REWARD_ON_GAP');
    expect(gate.log).toContain('b released');
    await gate.end('b');
    expect(await all.supervise(async () => 'all is well')).toBe('all is well');
  });

  it('by a hang is told with the last sign of life, and the pool gives its devices to nobody', async () => {
    const all = pools({ timeoutSeconds: 0.05 });
    const hanging = { run: async () => new Promise(() => all.get('p').alive('forward on rank 2')) };
    const p = all.get('p').place('critic', hanging, { run: 'run' });
    const q = all.get('q').place('w', { wait: (x: unknown) => x }, { wait: 'wait' });
    const error = await errorOf(all.supervise(async () => q.wait(p.run())));
    expect(error).toMatchObject({ code: 'WORKER_HUNG', details: { worker: 'critic', method: 'run', pool: 'p' } });
    expect(error.message).toMatch(/critic\.run has shown no sign of life for .*the last was forward on rank 2/);
    expect(await errorOf(p.run())).toBe(error);
    expect(await q.wait(1)).toBe(1);
    await all.close();
  });

  it('is not what a call does that shows signs of life, of its own or of its devices', async () => {
    const p = pool('p', { timeoutSeconds: 0.1 });
    const long = {
      own: async () => {
        const alive = callProgress();
        for (let i = 0; i < 12; i++) await delay(20).then(() => alive(`token ${i}`));
        return 'done';
      },
      devices: async () => {
        for (let i = 0; i < 12; i++) await delay(20).then(() => p.alive('forward'));
        return 'done';
      },
      computing: async () => {
        const begin = performance.now();
        const busyUntil = (end: number) => {
          while (performance.now() < end);
        };
        while (performance.now() - begin < 300) await delay(1).then(() => busyUntil(performance.now() + 10));
        return 'done';
      },
    };
    const placed = p.place('w', long, { own: 'own', devices: 'devices', computing: 'computing' });
    expect(await Promise.all([placed.own(), placed.devices(), placed.computing()])).toEqual(Array(3).fill('done'));
  });
});

describe('cancelling', () => {
  it('rejects what waits at once, tells what runs, and close waits for that', async () => {
    const gate = new Gate();
    const controller = new AbortController();
    const all = ResourcePools.create([{ name: 'p', devices: [0] }], { signal: controller.signal });
    const p = all.get('p').place('w', gate, { pass: 'pass' });
    const iteration = all.supervise(async () => Promise.allSettled([p.pass('running'), p.pass('waiting')]));
    await gate.begun('running');
    controller.abort();
    await expect(iteration).rejects.toBe(controller.signal.reason);
    expect(gate.log).toEqual(['running begins', 'running released']);
    await expect(p.pass('later')).rejects.toBe(controller.signal.reason);
    let closed = false;
    const closing = all.close().then(() => {
      closed = true;
    });
    await delay(5);
    expect(closed).toBe(false);
    await gate.end('running');
    await closing;
    await expect(all.supervise(async () => 1)).rejects.toBe(controller.signal.reason);
  });

  it('a closed pool says so', async () => {
    const p = pool('p');
    const placed = p.place('w', { run: () => 1 }, { run: 'run' });
    await p.close();
    await p.close();
    expect(await errorOf(placed.run())).toMatchObject({ code: 'POOL_CLOSED' });
    expect(await errorOf(p.turn(async () => 1))).toMatchObject({ code: 'POOL_CLOSED' });
  });
});
