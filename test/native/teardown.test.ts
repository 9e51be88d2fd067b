/**
 * Importing starts nothing; closing is idempotent; a process or thread that ends in the middle of a kernel never aborts
 * (DESIGN §5). Exit codes 134 and 139, and any signal, are failures.
 */
import { setImmediate as tick } from 'node:timers/promises';
import { describe, expect, test } from 'vitest';
import { createDevice } from '../../src/checkpoints/load-model.js';
import { LockstepError } from '../../src/errors.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import {
  built,
  childPrelude,
  type Ended,
  randomModel,
  requestsOf,
  runModule,
  sampling,
  scoreTogether,
  sequencesOf,
  smallShape,
  tinyShape,
  withEngine,
} from './support.js';

/** A forward pass over 32 of its longest sequences takes many seconds; a layer of it, a part of one. */
const heavyShape: ModelShape = {
  ...smallShape,
  width: 512,
  feedForward: 1408,
  layers: 24,
  windows: Array.from({ length: 24 }, () => 0),
};
const heavy = childPrelude(heavyShape);
const light = childPrelude(tinyShape);
const heavyLengths = 'Array.from({ length: 32 }, () => 1000)';

function expectQuiet({ code, signal, stdout, stderr }: Ended, output: string, expectedCode = 0): void {
  expect({ code, signal, stdout: stdout.trim(), stderr }).toEqual({
    code: expectedCode,
    signal: null,
    stdout: output,
    stderr: '',
  });
}

/** Facts that a process can see of itself; all threads of libuv's pool run before the first look. */
const observe = `
import { readdirSync, readFileSync, promises } from 'node:fs';
await Promise.all(Array.from({ length: 16 }, () => promises.readFile('/proc/self/status')));
const threads = () => readdirSync('/proc/self/task').length;
const caught = () => /^SigCgt:\\s+(\\w+)/m.exec(readFileSync('/proc/self/status', 'utf8'))[1];
const listeners = () => process.eventNames().filter((name) => /^SIG|^exit|^beforeExit|^uncaught|^unhandled/.test(String(name)));
const seen = () => ({ threads: threads(), caught: caught(), listeners: listeners().join() });
`;

describe('importing', () => {
  test('prints nothing, starts no thread, catches no signal', async () => {
    const ended = await runModule(`${observe}
      const before = seen();
      const names = Object.keys(await import(${built('index.js')}));
      const after = seen();
      console.log(JSON.stringify({ same: JSON.stringify(before) === JSON.stringify(after), train: names.includes('train') }));
    `);
    expectQuiet(ended, '{"same":true,"train":true}');
  });

  test('the addon brings no thread and no signal handler; a device has its threads until it is closed', async () => {
    const ended = await runModule(`${observe}${light}
      const { loadNative } = await import(${built('engine/native.js')});
      const before = seen();
      loadNative();
      const loaded = seen();
      const { device, engine } = open(3);
      await forward(engine, [5, 9]);
      const running = seen();
      await device.close();
      const after = seen();
      console.log(JSON.stringify([loaded, running, after].map((now) => ({
        threads: now.threads - before.threads,
        caught: now.caught === before.caught && now.listeners === before.listeners,
      }))));
    `);
    expectQuiet(
      ended,
      JSON.stringify([
        { threads: 0, caught: true },
        { threads: 3, caught: true },
        { threads: 0, caught: true },
      ]),
    );
  });
});

describe('closing', () => {
  const model = randomModel('tiny', tinyShape);
  const sequences = sequencesOf(tinyShape, [5, 9]);
  const isClosed = async (run: () => unknown) => {
    const error = await (async () => run())().catch((reason: unknown) => reason);
    expect(LockstepError.isInstance(error), String(error)).toBe(true);
    expect((error as LockstepError).code).toBe('CLOSED');
  };
  const step = { learningRate: 0, betas: [0, 0], epsilon: 1, weightDecay: 0, clipNorm: 0, step: 1 } as const;

  test('an engine twice is once; every use of it afterwards is CLOSED', () =>
    withEngine(model, { dtype: 'float32', train: true }, async (engine, device) => {
      await scoreTogether(engine, sequences, { keep: true });
      await engine.close();
      await engine.close();
      expect(device.heldBytes).toBe(0);
      for (const use of [
        () => scoreTogether(engine, sequences),
        () => engine.backward({}),
        () => engine.step(step),
        () => engine.generate(requestsOf(sequences), sampling),
        () => engine.readTensor('lm_head.weight'),
        () => engine.writeTensor('lm_head.weight', new Float32Array(tinyShape.vocabulary * tinyShape.width)),
        () => engine.publish(),
        () => engine.memory(),
      ]) {
        await isClosed(use);
      }
    }));

  test('a device twice is once; its engines are CLOSED, again and again', () =>
    withEngine(model, { dtype: 'float32' }, async (engine, device) => {
      const running = Array.from({ length: 5 }, () => scoreTogether(engine, sequences).catch((e) => e.code));
      await device.close();
      await device.close();
      for (const outcome of await Promise.all(running))
        expect(outcome === 'ABORTED' || outcome.length === 2).toBe(true);
      for (let i = 0; i < 50; i++) {
        await isClosed(() => scoreTogether(engine, sequences));
        await isClosed(() => engine.generate(requestsOf(sequences), sampling));
        await tick();
      }
      await isClosed(() => model.open({ device, dtype: 'float32' }));
    }));

  test('an engine does not cut off the call that runs', () =>
    withEngine(model, { dtype: 'float32' }, async (engine) => {
      const running = scoreTogether(engine, sequences);
      await engine.close();
      expect((await running).length).toBe(2);
    }));

  test('happens by `await using`', async () => {
    let outside:
      | { engine: Awaited<ReturnType<typeof model.open>>; device: ReturnType<typeof createDevice> }
      | undefined;
    {
      await using device = createDevice({ threads: 1 });
      await using engine = await model.open({ device, dtype: 'float32' });
      outside = { engine, device };
      expect((await scoreTogether(engine, sequences)).length).toBe(2);
    }
    expect(outside.device.heldBytes).toBe(0);
    await isClosed(() => scoreTogether(outside.engine, sequences));
    await isClosed(() => model.open({ device: outside.device, dtype: 'float32' }));
  });

  test('a device in the middle of a kernel ends the call with ABORTED', async () => {
    const ended = await runModule(`${heavy}
      const { device, engine } = open();
      const running = forward(engine, ${heavyLengths}).then(() => 'finished', (error) => error.code);
      await new Promise((done) => setTimeout(done, 300));
      await device.close();
      console.log(await running);
    `);
    expectQuiet(ended, 'ABORTED');
  });
});

describe('a process ends', () => {
  test('by itself when nothing runs, with a device and an engine left open', async () => {
    const ended = await runModule(`${light}
      const { engine } = open();
      await forward(engine, [4]);
      console.log('end');
    `);
    expectQuiet(ended, 'end');
  });

  test('not before the calls in flight have', async () => {
    const ended = await runModule(`${light}
      const { engine } = open();
      forward(engine, [900]).then(() => console.log('computed'));
    `);
    expectQuiet(ended, 'computed');
  });

  test.each([
    ['process.exit()', 'process.exit(7)', 7, ''],
    ['process.reallyExit', 'process.reallyExit(3)', 3, ''],
    ['an uncaught error', "throw new Error('mine')", 1, 'mine'],
  ])('in the middle of a kernel by %s', async (_, how, code, message) => {
    const ended = await runModule(`${heavy}
      const { engine } = open();
      forward(engine, ${heavyLengths}).then(() => console.log('finished'));
      setTimeout(() => { ${how} }, 300);
    `);
    expect({ code: ended.code, signal: ended.signal, stdout: ended.stdout }).toEqual({
      code,
      signal: null,
      stdout: '',
    });
    if (message === '') expect(ended.stderr).toBe('');
    else expect(ended.stderr).toContain(message);
  });

  test('in the middle of a generation that reports', async () => {
    const ended = await runModule(`${childPrelude({ ...smallShape, layers: 12, windows: Array(12).fill(0) })}
      const { engine } = open();
      let calls = 0;
      engine.generate(
        Array.from({ length: 8 }, (_, id) => ({ prompt: text(30 + id), id })),
        { maxNewTokens: 1000, temperature: 1, topP: 1, topK: 0, stopTokens: [], seed: 1,
          onProgress: () => { if (++calls === 3) process.exit(5); } },
      ).then(() => console.log('finished'));
    `);
    expectQuiet(ended, '', 5);
  });
});

/** A worker thread that runs the code and may use `say(message)`; the main thread's code sees `worker` and `said()`. */
const withWorker = (worker: string, main: string): string => `
  import { Worker } from 'node:worker_threads';
  const start = () => {
    const worker = new Worker(${JSON.stringify(`(async () => { const { parentPort } = await import('node:worker_threads'); const say = (m) => parentPort.postMessage(m); ${worker} })();`)}, { eval: true });
    const messages = [];
    let wake = () => {};
    worker.on('message', (message) => { messages.push(message); wake(); });
    worker.on('error', (error) => { console.log('worker failed: ' + error.message); process.exit(1); });
    const said = async () => {
      while (messages.length === 0) await new Promise((done) => { wake = done; });
      return messages.shift();
    };
    return { worker, said, messages };
  };
  const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
  ${main}
`;

describe('worker threads', () => {
  test('terminated in the middle of a kernel leave the process alive and well', async () => {
    const ended = await runModule(
      withWorker(
        `${heavy}
        const { engine } = open();
        const running = forward(engine, ${heavyLengths});
        say('running');
        await running;
        say('finished');`,
        `for (let round = 0; round < 2; round++) {
          const { worker, said, messages } = start();
          await said();
          await pause(200);
          await worker.terminate();
          console.log(messages.length === 0 ? 'stopped' : messages[0]);
        }
        ${light}
        const { device, engine } = open();
        const { logprobs } = await forward(engine, [20]);
        console.log(logprobs.length);
        await device.close();`,
      ),
    );
    expectQuiet(ended, 'stopped\nstopped\n20');
  });

  test('terminated in the middle of a generation that reports', async () => {
    const ended = await runModule(
      withWorker(
        `${childPrelude({ ...smallShape, layers: 12, windows: Array(12).fill(0) })}
        const { engine } = open();
        let first = true;
        await engine.generate(
          Array.from({ length: 8 }, (_, id) => ({ prompt: text(30 + id), id })),
          { maxNewTokens: 1000, temperature: 1, topP: 1, topK: 0, stopTokens: [], seed: 1,
            onProgress: () => { if (first) say('running'); first = false; } },
        );
        say('finished');`,
        `const { worker, said, messages } = start();
        await said();
        await pause(60);
        await worker.terminate();
        console.log(messages.length === 0 ? 'stopped' : messages[0]);`,
      ),
    );
    expectQuiet(ended, 'stopped');
  });

  test('that end while the main thread computes take nothing of it with them', async () => {
    const ended = await runModule(
      withWorker(
        `${light}
        const { engine } = open(1);
        await forward(engine, [50]);
        say('done');`,
        `${light}
        const { device, engine } = open(2);
        const alone = (await forward(engine, [70, 30])).logprobs.join();
        let same = 0;
        for (let round = 0; round < 3; round++) {
          const { worker, said } = start();
          const beside = forward(engine, [70, 30]);
          await said();
          await worker.terminate();
          if ((await beside).logprobs.join() === alone) same += 1;
          if ((await forward(engine, [70, 30])).logprobs.join() === alone) same += 1;
        }
        console.log(same);
        await device.close();`,
      ),
    );
    expectQuiet(ended, '6');
  });

  test('load the addon at the same time and compute the same', async () => {
    const ended = await runModule(
      withWorker(
        `${light}
        const { device, engine } = open(2);
        for (const tensor of checkpointTensors(engine)) {
          const size = tensor.shape.reduce((a, b) => a * b);
          await engine.writeTensor(tensor.name, Float32Array.from({ length: size }, (_, i) => Math.sin(i + 1)));
        }
        await engine.publish();
        const { logprobs } = await forward(engine, [100, 40]);
        say(logprobs.join());
        await device.close();`,
        `const workers = [start(), start(), start()];
        const results = await Promise.all(workers.map(({ said }) => said()));
        await Promise.all(workers.map(({ worker }) => worker.terminate()));
        console.log(new Set(results).size, results[0].length > 500);`,
      ),
    );
    expectQuiet(ended, '1 true');
  });
});
