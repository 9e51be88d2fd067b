import { PassThrough, Writable } from 'node:stream';
import { describe, expect, test } from 'vitest';
import { formatBytes, TrainProgress } from '../../src/cli/progress.js';
import { Terminal } from '../../src/cli/terminal.js';
import type { TrainEvent } from '../../src/train/events.js';

function streams({ isTTY = false, environment = {} as Record<string, string>, quiet = false } = {}) {
  const stdout = new PassThrough();
  const stderr = Object.assign(new PassThrough(), { isTTY, columns: 60 });
  const terminal = new Terminal({ stdout, stderr, environment, quiet });
  const read = (stream: PassThrough) => (stream.read() as Buffer | null)?.toString() ?? '';
  return { terminal, out: () => read(stdout), err: () => read(stderr) };
}

describe('the terminal', () => {
  test('results go to stdout, progress and errors to stderr', () => {
    const { terminal, out, err } = streams();
    terminal.print('result');
    terminal.note('progress');
    terminal.error('failure');
    expect(out()).toBe('result\n');
    expect(err()).toBe('progress\nfailure\n');
  });

  test('quiet hides progress and keeps errors', () => {
    const { terminal, err } = streams({ quiet: true, isTTY: true });
    terminal.note('progress');
    terminal.status('live');
    terminal.error('failure');
    expect(err()).toBe('failure\n');
  });

  test('the live line is for terminals, fits them, and gives way to lasting lines', async () => {
    const { terminal, err } = streams({ isTTY: true });
    terminal.status('x'.repeat(100));
    expect(err()).toBe(`\r\x1b[K${'x'.repeat(59)}`);
    terminal.status('live');
    terminal.note('lasting');
    expect(err()).toBe('\r\x1b[Klive\r\x1b[Klasting\nlive');
    await terminal.finish();
    expect(err()).toBe('\r\x1b[K');
    const plain = streams();
    plain.terminal.status('live');
    expect(plain.err()).toBe('');
  });

  test.each([
    [{ isTTY: true }, true],
    [{ isTTY: false }, false],
    [{ isTTY: true, environment: { NO_COLOR: '1' } }, false],
    [{ isTTY: true, environment: { TERM: 'dumb' } }, false],
  ])('with %j colours are %s', (options, coloured) => {
    expect(streams(options).terminal.style('red', 'text') !== 'text').toBe(coloured);
  });

  test('a reader that goes away ends output, not the process', async () => {
    const broken = new Writable({
      write: (_chunk, _encoding, done) => done(Object.assign(new Error('write EPIPE'), { code: 'EPIPE' })),
    });
    const terminal = new Terminal({ stdout: broken, stderr: new PassThrough(), environment: {} });
    terminal.print('one');
    await new Promise((resolve) => setImmediate(resolve));
    expect(terminal.closed.aborted).toBe(true);
    terminal.print('two');
    await terminal.finish();
  });
});

describe('training progress', () => {
  const step = (index: number): TrainEvent => ({
    type: 'step',
    step: index,
    steps: 100,
    metrics: { step: index, 'reward.mean': 0.5, 'kl.mean': 0.01 },
  });
  const start = { type: 'start', step: 0, steps: 100, output: '/runs/x' } as const;
  const config = { algorithm: 'ppo', model: 'm', dtype: 'bfloat16', threads: 2 };
  const memory = { lines: [{ what: 'policy: weights', bytes: 2048 }], totalBytes: 3 * 2 ** 20, budgetBytes: 2 ** 33 };
  const begin = { ...start, config, memory } as unknown as TrainEvent;

  test('the end is foretold from the recent pace', () => {
    let clock = 1000;
    const { terminal, err } = streams({ isTTY: true });
    const wide = Object.defineProperty(terminal, 'columns', { value: 200 });
    const progress = new TrainProgress(wide, { now: () => clock });
    progress.show(begin);
    expect(err()).toContain('3 MiB of 8 GiB');
    for (let index = 1; index <= 30; index++) {
      clock += index <= 10 ? 60 : 2;
      progress.show(step(index));
    }
    const last = err().split('\r').at(-1)!;
    expect(last).toContain('step  30/100');
    expect(last).toContain('reward 0.5');
    expect(last).toContain('2 s/step');
    expect(last).toContain('ETA 2 min 20 s');
  });

  test('a run on GPUs says on which, and whose they are', () => {
    const { terminal, err } = streams();
    const gpus = [
      { pool: 'policy', first: 0, last: 1, shared: true },
      { pool: 'reward', first: 0, last: 0, shared: false },
    ];
    new TrainProgress(terminal).show({ ...start, config, memory: { ...memory, gpus } } as unknown as TrainEvent);
    expect(err()).toContain('policy: on GPU 0..1, shared with the other pools\nreward: on GPU 0\nmemory: 3 MiB');
  });

  test('plain lines come every other second, and the last step always', () => {
    let clock = 0;
    const { terminal, err } = streams();
    const progress = new TrainProgress(terminal, { now: () => clock });
    progress.show(begin);
    err();
    for (let index = 1; index <= 100; index++) {
      clock += 0.1;
      progress.show(step(index));
    }
    const lines = err().trim().split('\n');
    expect(lines.length).toBeGreaterThan(4);
    expect(lines.length).toBeLessThan(8);
    expect(lines.at(-1)).toContain('step 100/100');
    expect(lines.at(-1)).not.toContain('ETA');
  });

  test('warnings and evaluations stay on the screen', () => {
    const { terminal, err } = streams();
    const progress = new TrainProgress(terminal);
    progress.show({ type: 'warning', code: 'SAMPLING_BIAS', message: 'biased', step: 0 });
    progress.show({ type: 'evaluation', step: 5, metrics: { step: 5, loss: 1, 'eval.loss': 2.5 }, samples: [] });
    progress.show({ type: 'interrupted', step: 5, checkpoint: '/c', output: '/runs/x' });
    expect(err()).toBe(
      'warning SAMPLING_BIAS: biased\nevaluation at step 5: eval.loss 2.5\ninterrupted after step 5; the newest checkpoint is /c; go on with --resume (/runs/x)\n',
    );
  });

  test.each([
    [512, '512 B'],
    [1536, '1.5 KiB'],
    [8 * 2 ** 30, '8 GiB'],
  ])('%d bytes are %s', (bytes, written) => {
    expect(formatBytes(bytes)).toBe(written);
  });
});
