/** Laws of worker groups: N ranks answer as one; calls run on all ranks; a failing rank releases the others and is named. */
import { setTimeout as delay } from 'node:timers/promises';
import { describe, expect, expectTypeOf, it } from 'vitest';
import { callFirstRow, callSignal, inContext } from '../../src/cluster/call-context.js';
import type { RankFailure } from '../../src/cluster/call-ranks.js';
import type { Future } from '../../src/cluster/future.js';
import { registerProtocol } from '../../src/cluster/protocols.js';
import { Shards } from '../../src/cluster/rows.js';
import { inProcess, type Transport } from '../../src/cluster/transport.js';
import { type RankContext, WorkerGroup } from '../../src/cluster/worker-group.js';
import { LockstepError } from '../../src/errors.js';
import { coordinatesOf, generationReplicas, worldSize } from '../../src/layout/parallel.js';
import { CopyingTransport } from './copying-transport.js';
import { CountingWorker, countingWorkers, degrees, layouts } from './counting-worker.js';

/** Three rows of 1, 3 and 2 tokens. */
const packed = () => ({
  tokens: Int32Array.of(0, 10, 11, 12, 20, 21),
  lengths: Int32Array.of(1, 3, 2),
  logprobs: Float32Array.of(-1, -2, -3, -4, -5, -6),
  prompts: ['a', 'b', 'c'],
});

describe('calling', () => {
  it('N ranks answer as one rank, in every layout', async () => {
    for (const { layout, generation } of layouts(8)) {
      const workers = countingWorkers(worldSize(layout));
      const group = WorkerGroup.create({
        name: 'g',
        layout,
        generation,
        worker: workers,
        protocols: { scale: '3D_PROTO', echo: '3D_ALL_MICRO_DP' },
      });
      const batch = Float32Array.of(1, 2, 3, 4, 5);
      expect(await group.scale(batch, { factor: 2 })).toEqual(batch.map((x) => 2 * x));
      expect(await group.echo(packed())).toEqual(packed());
      for (const { calls } of workers) expect(calls).toEqual({ scale: 1, echo: 1 });
    }
  });

  it('tells each rank with which row of the batch its part begins', async () => {
    const numbered = (rows: readonly string[]) => rows.map((_, i) => callFirstRow() + i);
    for (const { layout, generation } of layouts(8)) {
      const group = WorkerGroup.create({
        ...{ name: 'g', layout, generation },
        worker: () => ({ numbered, generated: async (rows: readonly string[]) => numbered(rows), all: numbered }),
        protocols: { numbered: '3D_PROTO', generated: '3D_ALL_MICRO_DP', all: 'ONE_TO_ALL' },
      });
      const rows = [...'abcdefg'];
      expect(await group.numbered(rows)).toEqual([0, 1, 2, 3, 4, 5, 6]);
      expect(await group.generated(rows)).toEqual([0, 1, 2, 3, 4, 5, 6]);
      expect(await group.numbered(new Shards([['a'], ['b', 'c', 'd']]))).toEqual([0, 1, 2, 3]);
      for (const answer of await group.all(rows)) expect(answer[0]).toBe(0);
    }
    expect(callFirstRow()).toBe(0);
  });

  it('calls ranks whose shard is empty, with an empty batch', async () => {
    const workers = countingWorkers(3);
    const group = WorkerGroup.create({
      name: 'g',
      layout: degrees(1, 1, 3),
      worker: workers,
      protocols: { echo: 'DP_PROTO' },
    });
    expect(await group.echo(Float32Array.of(7))).toEqual(Float32Array.of(7));
    expect(workers.map(({ received }) => received)).toEqual([
      [Float32Array.of(7)],
      [new Float32Array(0)],
      [new Float32Array(0)],
    ]);
  });

  it('makes a worker per rank and tells it its place', () => {
    const seen: RankContext[] = [];
    const layout = degrees(2, 2, 2);
    WorkerGroup.create({
      name: 'g',
      layout,
      generation: { pipeline: 1, tensor: 2 },
      worker: (context) => {
        seen.push(context);
        return new CountingWorker(context.rank);
      },
      protocols: {},
    });
    expect(seen).toEqual(
      Array.from({ length: 8 }, (_, rank) => ({
        rank,
        layout,
        generation: { pipeline: 1, tensor: 2 },
        coordinates: coordinatesOf(rank, layout),
      })),
    );
  });

  it('gives arguments after the first to every rank as they are, and none when there are none', async () => {
    const workers = countingWorkers(2);
    const group = WorkerGroup.create({
      name: 'g',
      layout: degrees(1, 1, 2),
      worker: workers,
      protocols: { scale: 'DP_PROTO', describe: 'ONE_TO_ALL' },
    });
    const options = { factor: 3, weights: [1, 2, 3] };
    await group.scale(Float32Array.of(1, 2), options);
    for (const { received } of workers) expect(received[0]).toBe(options);
    expect(await group.describe()).toEqual(['rank 0', 'rank 1']);
  });

  it('runs ranks at the same time', async () => {
    let running = 0;
    let arrived: () => void = () => {};
    const everyone = new Promise<void>((resolve) => {
      arrived = resolve;
    });
    const meet = async (rows: number[]) => {
      if (++running === 4) arrived();
      await everyone;
      return rows;
    };
    const group = WorkerGroup.create({
      name: 'g',
      layout: degrees(1, 1, 4),
      worker: () => ({ meet }),
      protocols: { meet: 'DP_PROTO' },
    });
    expect(await group.meet([1, 2, 3, 4, 5])).toEqual([1, 2, 3, 4, 5]);
  });

  it('orders rows by shard, not by who answers first', async () => {
    const group = WorkerGroup.create({
      name: 'g',
      layout: degrees(1, 1, 3),
      worker: ({ rank }) => ({
        late: async (rows: number[]) => {
          await delay(10 * (3 - rank));
          return rows;
        },
      }),
      protocols: { late: 'DP_PROTO' },
    });
    expect(await group.late([1, 2, 3, 4])).toEqual([1, 2, 3, 4]);
  });

  it('collects one answer per generation replica', async () => {
    const layout = degrees(2, 4, 1);
    const generation = { pipeline: 1, tensor: 2 };
    const group = WorkerGroup.create({
      name: 'g',
      layout,
      generation,
      worker: ({ rank }) => new CountingWorker(rank),
      protocols: { who: '3D_ALL_MICRO_DP' },
    });
    const { replicaOfRank } = generationReplicas(layout, generation);
    expect((await group.who([1, 2, 3, 4])).map((rank) => replicaOfRank[rank])).toEqual([0, 1, 2, 3]);
  });

  it('takes what another group left in parts, without joining it', async () => {
    const workers = countingWorkers(2);
    const group = WorkerGroup.create({
      name: 'g',
      layout: degrees(1, 1, 2),
      worker: workers,
      protocols: { echo: 'DP_PROTO' },
    });
    const parts = [Float32Array.of(1), Float32Array.of(2, 3)];
    expect(await group.echo(new Shards(parts))).toEqual(Float32Array.of(1, 2, 3));
    workers.forEach(({ received }, rank) => {
      expect(received[0]).toBe(parts[rank]);
    });
  });
});

describe('bytes', () => {
  const groupOver = (transport: Transport) => {
    const workers = countingWorkers<ReturnType<typeof packed>>(4);
    const options = { name: 'g', layout: degrees(1, 2, 2), worker: workers, transport };
    return { workers, group: WorkerGroup.create({ ...options, protocols: { echo: '3D_PROTO' } }) };
  };

  it('in one process ranks see views of the batch, the result is a view of it, and nothing is copied', async () => {
    const { workers, group } = groupOver(inProcess);
    const batch = packed();
    const result = await group.echo(batch);
    for (const { received } of workers) {
      expect((received[0] as typeof batch).tokens.buffer).toBe(batch.tokens.buffer);
    }
    expect(result.tokens.buffer).toBe(batch.tokens.buffer);
    expect(result.logprobs.buffer).toBe(batch.logprobs.buffer);
    expect(inProcess.bytesCopied).toBe(0);
  });

  it('a transport that copies counts what each rank receives and what is collected', async () => {
    const transport = new CopyingTransport();
    const { workers, group } = groupOver(transport);
    const batch = packed();
    const result = await group.echo(batch);
    expect(result).toEqual(batch);
    expect(result.tokens.buffer).not.toBe(batch.tokens.buffer);
    // Every row goes to two ranks and comes back from one: 6 tokens and log-probs, 3 lengths.
    expect(transport.bytesCopied).toBe(3 * (6 * 4 + 6 * 4 + 3 * 4));
    expect(workers.map(({ calls }) => calls.echo)).toEqual([1, 1, 1, 1]);
  });

  it('what a transport cannot carry fails on the rank', async () => {
    const group = WorkerGroup.create({
      name: 'g',
      layout: degrees(1, 1, 2),
      worker: () => ({ run: (rows: number[], loss: () => number) => rows.map(loss) }),
      protocols: { run: 'DP_PROTO' },
      transport: new CopyingTransport(),
    });
    await expect(group.run([1, 2], () => 1)).rejects.toThrow(/g\.run failed on 2 of 2 ranks.*could not be cloned/);
  });
});

describe('failing', () => {
  /** Four ranks whose `work` does what `act` says for a rank. */
  const groupOf = (act: (rank: number) => unknown, timeoutSeconds = 5) =>
    WorkerGroup.create({
      name: 'critic',
      layout: degrees(2, 1, 2),
      worker: ({ rank }) => ({ work: (_rows: number[]) => act(rank) as number[] | Promise<number[]> }),
      protocols: { work: '3D_PROTO' },
      timeoutSeconds,
    });

  /** Waits for the release, then stops as an API with a signal does. */
  const untilReleased = async (log: number[], rank: number) => {
    const signal = callSignal()!;
    await delay(60_000, undefined, { signal }).finally(() => log.push(rank));
  };

  const failureOf = async (call: Promise<unknown>): Promise<LockstepError> => {
    const error = await call.then(
      () => undefined,
      (reason: unknown) => reason,
    );
    expect(LockstepError.isInstance(error)).toBe(true);
    return error as LockstepError;
  };

  it('names group, method, rank and cause, after the other ranks were released', async () => {
    const released: number[] = [];
    const cause = new Error('out of memory');
    const group = groupOf((rank) => {
      if (rank === 2) throw cause;
      return untilReleased(released, rank);
    });
    const error = await failureOf(group.work([1, 2]));
    expect(released.sort()).toEqual([0, 1, 3]);
    expect(error.code).toBe('RANK_FAILED');
    expect(error.message).toBe(
      'critic.work failed on 1 of 4 ranks. rank 2 (pipeline 0, tensor 0, data 1): out of memory. ' +
        'All other ranks have returned.',
    );
    expect(error.cause).toBe(cause);
    expect(error.details).toEqual({
      group: 'critic',
      method: 'work',
      ranks: [2],
      failures: [{ rank: 2, coordinates: { pipeline: 0, tensor: 0, data: 1 }, error: cause }],
      running: [],
    });
  });

  it('calls no rank when the call that it is part of has ended already', async () => {
    let called = 0;
    const group = groupOf(() => {
      called += 1;
      return new Promise<number[]>(() => undefined);
    }, 0.05);
    const reason = new Error('the iteration has failed');
    const call = inContext({ signal: AbortSignal.abort(reason) }, () => group.work([1, 2]));
    await expect(Promise.race([call, delay(5000, 'still waiting')])).rejects.toBe(reason);
    expect(called).toBe(0);
  });

  it('a rank released by rethrowing the reason is not one that failed', async () => {
    const group = groupOf(async (rank) => {
      if (rank === 0) throw new Error('first');
      const signal = callSignal()!;
      await new Promise<void>((resolve) => signal.addEventListener('abort', () => resolve()));
      signal.throwIfAborted();
    });
    expect((await failureOf(group.work([1]))).details.ranks).toEqual([0]);
  });

  it('a rank that stops of itself before any other is one that failed', async () => {
    const group = groupOf((rank) => (rank === 1 ? Promise.reject(new DOMException('stop', 'AbortError')) : [rank]));
    expect((await failureOf(group.work([1, 2]))).details.ranks).toEqual([1]);
  });

  it('reports the errors of several ranks, in the order of time', async () => {
    const group = groupOf(async (rank) => {
      if (rank % 2 === 0) return [];
      await delay(rank === 3 ? 1 : 30);
      throw new Error(`broken ${rank}`);
    });
    const error = await failureOf(group.work([1, 2]));
    expect(error.message).toMatch(/on 2 of 4 ranks\. rank 3 .*: broken 3; rank 1 .*: broken 1\./);
    expect((error.details.failures as RankFailure[]).map(({ error }) => String(error))).toEqual([
      'Error: broken 3',
      'Error: broken 1',
    ]);
    expect((error.cause as Error).message).toBe('broken 3');
  });

  it('does not wait longer than the time-out for a rank that ignores the release', async () => {
    let answer: (rows: number[]) => void = () => {};
    const group = groupOf((rank) => {
      if (rank === 3) throw new Error('gone');
      return rank === 1 ? new Promise<number[]>((resolve) => (answer = resolve)) : [];
    }, 0.05);
    const begin = performance.now();
    const error = await failureOf(group.work([1, 2]));
    expect(performance.now() - begin).toBeLessThan(5000);
    expect(performance.now() - begin).toBeGreaterThan(45);
    expect(error.message).toMatch(/: gone\. Ranks \[1\] did not return within 0\.05 s/);
    expect(error.details.running).toEqual([1]);
    answer([]);
  });

  it('a late failure after the time-out is nobody’s unhandled rejection', async () => {
    const group = groupOf(async (rank) => {
      if (rank === 0) throw new Error('first');
      await delay(40);
      throw new Error('late');
    }, 0.01);
    const error = await failureOf(group.work([1, 2]));
    await delay(60);
    expect(error.details).toMatchObject({ ranks: [0], running: [1, 2, 3] });
    expect((error.details.failures as unknown[]).length).toBe(1);
  });

  it('waits as long as it takes while no rank fails', async () => {
    const group = groupOf(async (rank) => {
      await delay(rank === 1 ? 60 : 0);
      return [rank];
    }, 0.01);
    expect(await group.work([1, 2])).toEqual([1, 3]);
  });

  it('leaves the next call, and a call beside it, alone', async () => {
    let calls = 0;
    const group = WorkerGroup.create({
      name: 'g',
      layout: degrees(1, 1, 2),
      worker: () => ({
        sometimes: async (rows: number[], fail: boolean) => {
          calls++;
          const signal = callSignal()!;
          await delay(10);
          if (fail) throw new Error('no');
          await delay(10);
          return signal.aborted ? [] : rows;
        },
      }),
      protocols: { sometimes: 'DP_PROTO' },
    });
    const [failed, beside] = await Promise.allSettled([group.sometimes([1, 2], true), group.sometimes([1, 2], false)]);
    expect(failed.status).toBe('rejected');
    expect(beside).toEqual({ status: 'fulfilled', value: [1, 2] });
    expect(await group.sometimes([3, 4], false)).toEqual([3, 4]);
    expect(calls).toBe(6);
    expect(callSignal()).toBeUndefined();
  });

  it('says of which call a batch could not be cut or joined, and calls no rank', async () => {
    const workers = countingWorkers(2);
    const group = WorkerGroup.create({
      name: 'actor',
      layout: degrees(1, 1, 2),
      worker: workers,
      protocols: { echo: 'DP_PROTO', describe: 'DP_PROTO' },
    });
    const notRows = { code: 'BATCH_INVALID', message: expect.stringMatching(/^actor\.echo: 5 has no rows/) };
    await expect(group.echo(5)).rejects.toMatchObject(notRows);
    expect(workers.map(({ calls }) => calls)).toEqual([{}, {}]);
    await expect(group.describe()).rejects.toMatchObject({
      code: 'BATCH_INVALID',
      message: expect.stringMatching(/^actor\.describe: .*"rank 0" and "rank 1"/),
    });
  });
});

describe('making a group', () => {
  const options = { name: 'actor', layout: degrees(1, 2, 2) };
  const refuse = (make: () => unknown, code: string, message: RegExp) =>
    expect(make).toThrow(expect.objectContaining({ code, message: expect.stringMatching(message) }));

  it('refuses a number of workers other than ranks', () => {
    refuse(
      () => WorkerGroup.create({ ...options, worker: countingWorkers(3), protocols: {} }),
      'GROUP_INVALID',
      /Group actor has 3 workers and a layout of pipeline 1 x tensor 2 x data 2 = 4 ranks/,
    );
  });

  it('refuses a layout without ranks', () => {
    refuse(
      () => WorkerGroup.create({ name: 'actor', layout: degrees(1, 0, 2), worker: [{}], protocols: {} }),
      'PARALLEL_INVALID',
      /parallel\.tensor: 0 is not a degree/,
    );
  });

  it('refuses a protocol for a method that a worker does not have', () => {
    refuse(
      // @ts-expect-error the method has another name
      () => WorkerGroup.create({ ...options, worker: countingWorkers(4), protocols: { ecco: '3D_PROTO' } }),
      'GROUP_INVALID',
      /protocol for ecco, which the worker of rank 0 does not have; it has .*echo/,
    );
  });

  it('refuses a name that is not registered and a routing that does not fit the layout', () => {
    refuse(
      () => WorkerGroup.create({ ...options, worker: countingWorkers(4), protocols: { echo: '4D_PROTO' } }),
      'PROTOCOL_UNKNOWN',
      /^actor\.echo: There is no transfer protocol 4D_PROTO/,
    );
    refuse(
      () => WorkerGroup.create({ ...options, worker: countingWorkers(4), protocols: { echo: 'DP_PROTO' } }),
      'PROTOCOL_INVALID',
      /^actor\.echo: .*exactly one answer per shard/,
    );
  });

  it('a method without a protocol says so when it is called', async () => {
    const group = WorkerGroup.create({ ...options, worker: countingWorkers(4), protocols: { who: '3D_PROTO' } });
    const unlisted = (group as unknown as { echo(rows: number[]): Promise<unknown> }).echo([1]);
    await expect(unlisted).rejects.toMatchObject({
      code: 'PROTOCOL_MISSING',
      message: expect.stringMatching(/^actor\.echo has no transfer/),
    });
  });
});

describe('pairs of a user', () => {
  /** Deals rows like cards; gives the sum of all answers. */
  const dealt = {
    distribute: (rows: number[], { layout }: { layout: { data: number } }) =>
      Array.from({ length: layout.data }, (_, rank) => rows.filter((_, row) => row % layout.data === rank)),
    collect: (answers: readonly number[][]) => answers.flat().reduce((sum, x) => sum + x, 0),
  };
  const options = { name: 'g', layout: degrees(1, 1, 2) };

  it('stand in the table, typed by what they take and give', async () => {
    const workers = countingWorkers(2);
    const group = WorkerGroup.create({ ...options, worker: workers, protocols: { echo: dealt } });
    const sum = await group.echo([1, 2, 3]);
    expectTypeOf(sum).toEqualTypeOf<number>();
    expect(sum).toBe(6);
    expect(workers.map(({ received }) => received[0])).toEqual([[1, 3], [2]]);
  });

  it('or are named there once registered', async () => {
    registerProtocol('DEALT', dealt);
    const group = WorkerGroup.create({ ...options, worker: countingWorkers(2), protocols: { echo: 'DEALT' } });
    expect(await group.echo([1, 2, 3])).toBe(6);
  });

  it('see the answers of the ranks they name', async () => {
    const first = { ...dealt, answers: () => [true, false], collect: (answers: readonly unknown[]) => answers };
    const group = WorkerGroup.create({ ...options, worker: countingWorkers(2), protocols: { echo: first } });
    expect(await group.echo([1, 2, 3])).toEqual([[1, 3], undefined]);
  });

  it('are held to one part per rank', async () => {
    const short = { distribute: () => [1], collect: () => 0 };
    const group = WorkerGroup.create({ ...options, worker: countingWorkers(2), protocols: { echo: short } });
    await expect(group.echo([1])).rejects.toMatchObject({
      code: 'PROTOCOL_INVALID',
      message: 'g.echo: distribute made 1 parts for 2 ranks; expected one for each.',
    });
  });
});

it('methods have the types that their protocols give them', () => {
  const group = WorkerGroup.create({
    name: 'g',
    layout: degrees(1, 1, 1),
    worker: countingWorkers(1),
    protocols: { scale: '3D_PROTO', who: '3D_PP_ONLY', describe: 'ALL_TO_ALL' },
  });
  expectTypeOf(group.scale).toEqualTypeOf<
    (
      batch: Float32Array | Shards<Float32Array> | Future<Float32Array>,
      options: { factor: number },
    ) => Future<Float32Array>
  >();
  expectTypeOf(group.who).returns.resolves.toEqualTypeOf<number[][]>();
  expectTypeOf(group.describe).toEqualTypeOf<() => Future<string[]>>();
  expectTypeOf(group).not.toHaveProperty('echo');
});
