import { spawn } from 'node:child_process';
import { appendFile, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { beforeEach, describe, expect, it } from 'vitest';
import { lockRun } from '../../src/train/lock.js';
import { Recorder } from '../../src/train/recorder.js';
import { RunFolder } from '../../src/train/run-folder.js';
import { Trace } from '../../src/train/trace.js';

const cpu = { gpus: [] };

let root: string;
beforeEach(async () => {
  root = await mkdtemp(join(tmpdir(), 'lockstep-folder-'));
});

/** Returns at once and writes behind. */
const fill = (text: string) => async (directory: string) => {
  const write = async () => {
    await new Promise((resolve) => setTimeout(resolve, 5));
    await mkdir(join(directory, 'trainer'));
    await writeFile(join(directory, 'trainer', 'state.json'), text);
  };
  return { written: write() };
};

const save = async (folder: RunFolder, step: number, keep: number, filling: ReturnType<typeof fill>) =>
  (await folder.beginCheckpoint(step, keep, filling)).written;

describe('a run folder', () => {
  it('keeps rows, texts and the newest checkpoints', async () => {
    const folder = await RunFolder.open(join(root, 'a', 'run'), { resume: false });
    await folder.begin('algorithm: sft\n', cpu, 0);
    await folder.appendMetrics({ step: 1, loss: 2 });
    await folder.writeSamples('eval', 1, [{ index: 0, prompt: 'a', response: 'b', finish: 'stop' }]);
    for (const step of [1, 2, 3]) await save(folder, step, 2, fill(`${step}`));
    expect((await folder.checkpoints()).map(({ step }) => step)).toEqual([2, 3]);
    await folder.close();
    expect((await readdir(folder.path)).sort()).toEqual([
      'checkpoints',
      'config.yaml',
      'device.json',
      'metrics.jsonl',
      'rollouts',
    ]);
    expect(await readdir(join(folder.path, 'checkpoints'))).toEqual(['step-000002', 'step-000003']);
    expect(await readFile(join(folder.path, 'metrics.jsonl'), 'utf8')).toBe('{"step":1,"loss":2}\n');
    expect(await readdir(join(folder.path, 'rollouts'))).toEqual(['eval-000001.jsonl']);
  });

  it('that holds a run is refused without resume, and left as it is', async () => {
    const first = await RunFolder.open(root, { resume: false });
    await first.begin('x', cpu, 0);
    await first.close();
    await expect(RunFolder.open(root, { resume: false })).rejects.toMatchObject({ code: 'RUN_EXISTS' });
    await (await RunFolder.open(root, { resume: true })).close();
  });

  it('is rid of what a killed process left beside the lock, not of what a live one is writing', async () => {
    const gone = spawn(process.execPath, ['-e', '']);
    await new Promise((resolve) => gone.once('close', resolve));
    const live = `.lock-${process.pid}-999`;
    for (const name of [`.lock-${gone.pid}-0`, `.lock-claim-${gone.pid}-1`, live])
      await writeFile(join(root, name), '{');
    const lock = await lockRun(root);
    expect((await readdir(root)).sort()).toEqual(['.lock', live]);
    await lock.release();
  });

  it('drops on resume what lies past the checkpoint, unfinished lines and leftovers', async () => {
    const folder = await RunFolder.open(root, { resume: false });
    await folder.begin('x', cpu, 0);
    for (let step = 0; step <= 5; step++) await folder.appendMetrics({ step, loss: step });
    for (const step of [0, 2, 4]) await folder.writeSamples('eval', step, []);
    await folder.close();
    await writeFile(join(root, 'metrics.jsonl'), `${await readFile(join(root, 'metrics.jsonl'), 'utf8')}{"step":6,"lo`);
    await mkdir(join(root, '.saving-step-000006'));
    const again = await RunFolder.open(root, { resume: true });
    await again.begin('x', cpu, 3);
    await again.appendMetrics({ step: 4, loss: 40 });
    await again.close();
    const rows = (await readFile(join(root, 'metrics.jsonl'), 'utf8')).trim().split('\n');
    expect(rows.map((row) => JSON.parse(row))).toEqual(
      [0, 1, 2, 3].map((step) => ({ step, loss: step })).concat({ step: 4, loss: 40 }),
    );
    expect(await readdir(join(root, 'rollouts'))).toEqual(['eval-000000.jsonl', 'eval-000002.jsonl']);
    expect(await readdir(root)).not.toContain('.saving-step-000006');
  });

  it('has a checkpoint when all of it is written, not before', async () => {
    const folder = await RunFolder.open(root, { resume: false });
    await folder.begin('x', cpu, 0);
    const { written, directory } = await folder.beginCheckpoint(1, 1, fill('1'));
    expect(await folder.checkpoints()).toEqual([]);
    expect((await readdir(root)).filter((name) => name.startsWith('.saving'))).toEqual(['.saving-step-000001']);
    await written;
    expect(await folder.checkpoints()).toEqual([{ step: 1, directory }]);
    expect(await readFile(join(directory, 'trainer', 'state.json'), 'utf8')).toBe('1');
    await folder.close();
  });

  const full = () => Object.assign(new Error('ENOSPC: no space left on device, write'), { code: 'ENOSPC' });

  it.each([
    ['begins', () => Promise.reject(full())],
    ['is under way', async () => ({ written: new Promise<void>((_, no) => setTimeout(() => no(full()), 5)) })],
  ])('a save that fails when it %s leaves no trace and the earlier checkpoint', async (_, failing) => {
    const folder = await RunFolder.open(root, { resume: false });
    await folder.begin('x', cpu, 0);
    await save(folder, 1, 1, fill('1'));
    await expect(save(folder, 2, 1, failing)).rejects.toMatchObject({
      code: 'CHECKPOINT_WRITE_FAILED',
      message: expect.stringContaining('no space left'),
    });
    expect((await folder.checkpoints()).map(({ step }) => step)).toEqual([1]);
    expect((await readdir(root)).filter((name) => name.startsWith('.saving'))).toEqual([]);
    await folder.close();
  });

  it('in which nothing was written disappears again', async () => {
    const path = join(root, 'new');
    await (await RunFolder.open(path, { resume: false })).close();
    expect(await readdir(root)).toEqual([]);
  });

  it('of which something cannot be read is an error with the path, and left as it is', async () => {
    const folder = await RunFolder.open(root, { resume: false });
    await folder.begin('x', cpu, 0);
    await folder.close();
    const again = await RunFolder.open(root, { resume: true });
    const unreadable = async (
      name: string,
      read: () => Promise<unknown>,
      damage: (path: string) => Promise<unknown>,
    ) => {
      const path = join(root, name);
      await rm(path, { recursive: true });
      await damage(path);
      await expect(read()).rejects.toMatchObject({ code: 'RUN_FOLDER', message: expect.stringContaining(path) });
    };
    // A folder in the place of a file, and a file in that of a folder, fail as a disk that gives errors does.
    await unreadable(
      'checkpoints',
      () => again.checkpoints(),
      (path) => writeFile(path, ''),
    );
    await rm(join(root, 'checkpoints'));
    await unreadable('metrics.jsonl', () => again.begin('x', cpu, 1), mkdir);
    expect(await readdir(root)).toContain('metrics.jsonl');
    await unreadable('config.yaml', () => again.config(), mkdir);
    await unreadable('device.json', () => again.architecture(), mkdir);
    await unreadable(
      'device.json',
      () => again.architecture(),
      (path) => writeFile(path, '{"gpus":'),
    );
    await rm(join(root, 'device.json'), { recursive: true });
    expect([await again.checkpoints(), await again.architecture()]).toEqual([[], undefined]);
    await again.close();
  });

  it('that cannot be made is an error with the path', async () => {
    await writeFile(join(root, 'file'), '');
    await expect(RunFolder.open(join(root, 'file', 'run'), { resume: false })).rejects.toMatchObject({
      code: 'RUN_FOLDER',
      message: expect.stringContaining(join(root, 'file', 'run')),
    });
  });
});

describe('the lock', () => {
  it('is held by one run at a time, also within a process', async () => {
    const lock = await lockRun(root);
    await expect(lockRun(root)).rejects.toMatchObject({
      code: 'RUN_LOCKED',
      message: expect.stringContaining(`process ${process.pid}`),
    });
    await lock.release();
    await (await lockRun(root)).release();
  });

  it('is refused while another process lives, and taken over when it is dead', async () => {
    const child = spawn(process.execPath, ['-e', 'setTimeout(() => {}, 60000)']);
    const started = (await readFile(`/proc/${child.pid}/stat`, 'utf8')).split(') ')[1]!.split(' ')[19];
    const text = JSON.stringify({ pid: child.pid, started, host: hostname() });
    await writeFile(join(root, '.lock'), text);
    await expect(lockRun(root)).rejects.toMatchObject({ code: 'RUN_LOCKED' });
    const gone = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await gone;
    await (await lockRun(root)).release();
  });

  it('of a process whose number was taken over by another is stale', async () => {
    await writeFile(join(root, '.lock'), JSON.stringify({ pid: process.pid, started: '1', host: hostname() }));
    await (await lockRun(root)).release();
  });

  it('that is garbage is taken over', async () => {
    await writeFile(join(root, '.lock'), '{"pid":');
    await (await lockRun(root)).release();
    await writeFile(join(root, '.lock'), '');
    await (await lockRun(root)).release();
    expect(await readdir(root)).toEqual([]);
  });

  it('that cannot be read is an error', async () => {
    await mkdir(join(root, '.lock'));
    await expect(lockRun(root)).rejects.toMatchObject({ code: 'EISDIR' });
  });

  it('goes to exactly one of many that find it stale', async () => {
    await writeFile(join(root, '.lock'), JSON.stringify({ pid: 2 ** 22 - 1, started: '1', host: hostname() }));
    const results = await Promise.allSettled(Array.from({ length: 8 }, () => lockRun(root)));
    expect(results.filter(({ status }) => status === 'fulfilled')).toHaveLength(1);
  });
});

describe('a trace', () => {
  type Event = { name: string; ts: number; dur: number };
  const path = () => join(root, 'trace.json');
  const events = async () => JSON.parse(await readFile(path(), 'utf8')) as Event[];
  const part = async (names: readonly string[], limitBytes?: number): Promise<Trace> => {
    const trace = new Trace(limitBytes);
    await trace.open(root);
    for (const name of names) {
      const start = performance.now();
      trace.draw({ name, cat: 'phase', tid: 1, start, end: start + 5 });
      await trace.flush();
    }
    return trace;
  };

  it.each([
    ['ended', (trace: Trace) => trace.close()],
    ['killed between events', async () => {}],
    ['killed in an event', () => appendFile(path(), ',\n{"name":"forward","ph":"X","pid":1,"ts')],
  ])('that was %s goes on behind its last event, and keeps every byte before', async (_, end) => {
    const long = `é${'x'.repeat(1000)}`;
    const first = await part(['', ...Array(1500).fill(long)]);
    const before = await readFile(path());
    await end(first);
    await (await part(['later'])).close();
    const after = await readFile(path());
    expect(before.length).toBeGreaterThan(2 ** 20);
    expect(after.subarray(0, before.length).equals(before)).toBe(true);
    const [last, later] = (await events()).slice(-2) as [Event, Event];
    expect([last.name, later.name]).toEqual([long, 'later']);
    expect(later.ts).toBeGreaterThanOrEqual(last.ts + last.dur);
    expect(await events()).toHaveLength(1502);
  });

  it.each([
    ['empty', ''],
    ['without an event', '[\n'],
  ])('that is %s begins again', async (_, text) => {
    await writeFile(path(), text);
    await (await part(['first'])).close();
    expect((await events()).map(({ name }) => name)).toEqual(['first']);
  });

  it('that has as many bytes as it may ends there, says so once, and can be read', async () => {
    const trace = await part(['one', 'two', 'three', 'four'], 250);
    expect(trace.isOpen).toBe(false);
    expect(trace.takeEnded()).toMatch(/it may hold 250 bytes and has \d+/);
    expect(trace.takeEnded()).toBeUndefined();
    await trace.close();
    expect((await events()).map(({ name }) => name)).toEqual(['one', 'two']);
    const again = await part(['five'], 250);
    expect(again.takeEnded()).toMatch(/250/);
    expect((await events()).map(({ name }) => name)).toEqual(['one', 'two']);
  });

  it('of which no event can be read is left as it is', async () => {
    const text = 'x'.repeat(2 ** 20 + 1);
    await writeFile(path(), text);
    const trace = await part(['lost']);
    await trace.close();
    expect(trace.takeEnded()).toMatch(/no event/);
    expect(await readFile(path(), 'utf8')).toBe(text);
  });
});

describe('the recorder', () => {
  it('adds up phases per step and writes a trace that parses, also across a kill', async () => {
    const recorder = new Recorder();
    await recorder.open(root);
    recorder.step = 1;
    await recorder.phase('data', () => new Promise((resolve) => setTimeout(resolve, 20)));
    await recorder.phase('data', () => new Promise((resolve) => setTimeout(resolve, 20)));
    const { 'seconds.data': seconds } = recorder.take();
    expect(seconds).toBeGreaterThan(0.03);
    expect(recorder.take()).toEqual({});
    await recorder.flush();
    const again = new Recorder();
    await again.open(root);
    await again.phase('late', () => undefined);
    await again.close();
    const events = JSON.parse(await readFile(join(root, 'trace.json'), 'utf8')) as {
      name: string;
      ts: number;
      dur: number;
    }[];
    expect(events.map(({ name }) => name)).toEqual(['data', 'data', 'late']);
    expect(events[2]!.ts).toBeGreaterThanOrEqual(events[1]!.ts + events[1]!.dur);
    await rm(root, { recursive: true });
  });

  it('draws a row for each rank: works, what of them was communication, and the idle time between', async () => {
    const recorder = new Recorder();
    const now = Number(process.hrtime.bigint()) / 1e9;
    recorder.work({ operation: 'load', begin: now, end: now + 1, communicating: 0, waiting: 0 }, 0); // before the trace
    await recorder.open(root);
    const at = Number(process.hrtime.bigint()) / 1e9 + 5;
    const work = { communicating: 0, waiting: 0 };
    recorder.work({ ...work, operation: 'forward', microBatch: 3, begin: at, end: at + 2 }, 1);
    recorder.work({ operation: 'backward', begin: at + 3, end: at + 7, communicating: 1.5, waiting: 1 }, 1);
    recorder.work({ ...work, operation: 'read', begin: at + 7, end: at + 8 }, 1);
    await recorder.close();
    type Event = { name: string; cat?: string; tid: number; ts: number; dur: number; args: { name?: string } };
    const events = JSON.parse(await readFile(join(root, 'trace.json'), 'utf8')) as Event[];
    const names = events.filter(({ name }) => name === 'thread_name').map(({ tid, args }) => [args.name, tid]);
    expect(names).toEqual([['rank 1', 6]]);
    const row = events.filter(({ name }) => name !== 'thread_name');
    expect(new Set(row.map(({ tid }) => tid))).toEqual(new Set([6]));
    const seconds = (microseconds: number): number => Math.round(microseconds / 1e4) / 100;
    const start = row[0]!.ts;
    expect(seconds(start)).toBe(5);
    expect(row.map(({ name, cat, ts, dur }) => [name, cat, seconds(ts - start), seconds(dur)])).toEqual([
      ['forward 3', 'compute', 0, 2],
      ['idle', 'idle', 2, 1],
      ['backward', 'compute', 3, 4],
      ['waiting', 'idle', 3, 1],
      ['communication', 'communication', 4, 0.5],
      ['read', 'transfer', 7, 1],
    ]);
    await rm(root, { recursive: true });
  });

  it('draws rows for the streams of each GPU: copies, and the computation of every pool', async () => {
    const recorder = new Recorder();
    await recorder.open(root);
    const at = Number(process.hrtime.bigint()) / 1e9;
    const times = { begin: at, end: at + 9, communicating: 0, waiting: 0 };
    const compute = { gpu: 1, stream: 'compute', begin: at + 1, end: at + 8, busy: 5, bytes: 0 } as const;
    recorder.work({ ...times, operation: 'backward', microBatch: 2, streams: [compute] }, 1);
    recorder.lane('critic', 0).work({ ...times, operation: 'step', streams: [compute] }, 1);
    const streams = (['to host', 'from host'] as const).map((stream) => ({ ...compute, stream, bytes: 77 }));
    recorder.work({ ...times, operation: 'move', streams }, 1);
    await recorder.close();
    type Event = { name: string; cat: string; tid: number; ts: number; dur: number; args: Record<string, unknown> };
    const events = JSON.parse(await readFile(join(root, 'trace.json'), 'utf8')) as Event[];
    const rows = new Map(events.filter(({ cat }) => !cat).map(({ tid, args }) => [tid, args.name]));
    expect(rows.size).toBe(6);
    const works = events.find(({ cat }) => cat === 'compute')!.ts;
    const drawn = events.filter(({ cat }) => cat === 'stream' || cat === 'compute');
    expect(
      drawn.map(({ name, tid, ts, dur, args: { busy, bytes } }) => {
        return [rows.get(tid), name, (ts - works) / 1e6, dur / 1e6, busy ?? bytes];
      }),
    ).toEqual([
      ['GPU 1 compute', 'backward 2', 1, 7, 5],
      ['rank 1', 'backward 2', 0, 9, undefined],
      ['critic/GPU 1 compute', 'step', 1, 7, 5],
      ['critic/rank 1', 'step', 0, 9, undefined],
      ['GPU 1 to host', 'move', 1, 7, 77],
      ['GPU 1 from host', 'move', 1, 7, 77],
    ]);
    await rm(root, { recursive: true });
  });

  it('wraps methods of objects with private state', async () => {
    class Counter {
      #n = 0;
      async add(n: number) {
        this.#n += n;
        return this.#n;
      }
      get n() {
        return this.#n;
      }
    }
    const recorder = new Recorder();
    const counter = recorder.wrap(new Counter(), { add: 'adding' });
    expect([await counter.add(2), await counter.add(3), counter.n]).toEqual([2, 5, 5]);
    expect(Object.keys(recorder.take())).toEqual(['seconds.adding']);
  });
});
