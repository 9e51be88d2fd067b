/** Where the models of a run lie changes when they run, and nothing else; a cancelled run goes on as if it had not been. */
import { mkdtemp, readdir, readFile, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import type { Backend, DeviceSettings } from '../../src/inference/backend.js';
import { parseConfig } from '../../src/train/config.js';
import type { MetricsRow, TrainEvent } from '../../src/train/events.js';
import { type Placement, poolsOf } from '../../src/train/placement.js';
import { preflight } from '../../src/train/preflight.js';
import { rolesOf } from '../../src/train/roles.js';
import { type TrainOptions, train } from '../../src/train/train.js';
import { digests } from '../digests.js';
import { TableEngine, tableBackend, writeTableModel } from './train-fake-engine.js';

let model: string;
let scorer: string;
let folder: string;

beforeAll(async () => {
  model = await writeTableModel();
  scorer = await writeTableModel({ architectures: ['LlamaForSequenceClassification'], num_labels: 1 }, 3);
  folder = await mkdtemp(join(tmpdir(), 'lockstep-placement-'));
  const rows = Array.from({ length: 12 }, (_, i) => JSON.stringify({ tokens: [2 + i, 3 + i] }));
  await writeFile(join(folder, 'prompts.jsonl'), rows.join('\n'));
});

let outputs = 0;
const ppo = (changes: Record<string, unknown> = {}) => ({
  algorithm: 'ppo',
  model,
  data: { train: join(folder, 'prompts.jsonl') },
  dtype: 'float32',
  optimizer: { learningRate: 0.05, weightDecay: 0 },
  rollout: { samples: 2, maxNewTokens: 6 },
  ppo: { epochs: 2, miniBatches: 2, kl: { controller: 'adaptive' } },
  batch: { sequences: 8, microTokens: 32 },
  reward: { model: scorer },
  checks: { mismatch: 'all' },
  checkpoint: { every: 2, keep: 9 },
  steps: 4,
  output: join(folder, `run-${outputs++}`),
  ...changes,
});

type Run = ReturnType<typeof ppo>;

async function run(config: Run, options: TrainOptions = {}): Promise<TrainEvent[]> {
  const events: TrainEvent[] = [];
  for await (const event of train(config as never, { backend: tableBackend, ...options })) events.push(event);
  return events;
}

const checkpoints = ({ output }: Run) => digests(join(output, 'checkpoints'));

async function metrics({ output }: Run): Promise<MetricsRow[]> {
  const rows = (await readFile(join(output, 'metrics.jsonl'), 'utf8')).trimEnd().split('\n');
  const timeless = (row: MetricsRow) => Object.entries(row).filter(([name]) => !name.startsWith('seconds.'));
  return rows.map((row) => Object.fromEntries(timeless(JSON.parse(row) as MetricsRow)) as MetricsRow);
}

interface Span {
  name: string;
  cat: string;
  tid: number;
  ts: number;
  dur: number;
  args: { step: number; name: string };
}

const traceOf = async ({ output }: Run) => JSON.parse(await readFile(join(output, 'trace.json'), 'utf8')) as Span[];
const overlap = (a: Span, b: Span) => a.ts < b.ts + b.dur && b.ts < a.ts + a.dur;

const placements: { pools: string[]; placement: Placement }[] = [
  { pools: ['policy+critic+reference+reward'], placement: 'colocated' },
  { pools: ['policy+reference', 'critic+reward'], placement: 'split' },
  { pools: ['policy', 'critic', 'reference', 'reward'], placement: 'standalone' },
  {
    pools: ['policy+critic', 'reward+reference'],
    placement: [
      ['actor', 'critic'],
      ['reward', 'reference'],
    ],
  },
];

describe('placement', () => {
  it('changes no metric and no byte of a checkpoint', async () => {
    const runs = placements.map(({ placement }) => ppo({ placement }));
    for (const config of runs) await run(config);
    const [first, ...others] = runs as [Run, ...Run[]];
    for (const other of others) {
      expect(await metrics(other)).toEqual(await metrics(first));
      expect(await checkpoints(other)).toEqual(await checkpoints(first));
    }
  });

  it('apart, critic, reference and reward run at the same time, and both updates do; together, in turn', async () => {
    for (const { placement, pools } of placements) {
      const config = ppo({ placement });
      await run(config);
      const trace = await traceOf(config);
      const names = trace.filter(({ name }) => name === 'thread_name').map(({ args }) => args.name);
      const expected = pools.length === 1 ? [] : pools.map((pool) => `${pool}/calls`);
      expect(names.filter((name) => name.endsWith('/calls')).sort()).toEqual(expected.sort());
      const spanOf = (step: number, name: string) =>
        trace.find((span) => span.cat === 'phase' && span.name === name && span.args.step === step)!;
      const poolOf = { values: 'critic', valueUpdate: 'critic', policyUpdate: 'policy' } as Record<string, string>;
      const apart = (a: string, b: string) =>
        !pools.some((pool) => [a, b].every((phase) => pool.split('+').includes(poolOf[phase] ?? phase)));
      for (const step of [1, 2, 3, 4]) {
        for (const [a, b] of [
          ['values', 'reference'],
          ['values', 'reward'],
          ['reference', 'reward'],
          ['policyUpdate', 'valueUpdate'],
        ] as const) {
          // What waits for its turn behind a call of its pool starts later; the first of each pool start together.
          if (pools.length === 4)
            expect([a, b, overlap(spanOf(step, a), spanOf(step, b))]).toEqual([a, b, apart(a, b)]);
          else if (!apart(a, b)) expect([a, b, overlap(spanOf(step, a), spanOf(step, b))]).toEqual([a, b, false]);
        }
        const updates = [spanOf(step, 'policyUpdate'), spanOf(step, 'valueUpdate')] as const;
        expect(overlap(...updates)).toBe(apart('policyUpdate', 'valueUpdate'));
      }
    }
  });

  it('the trace lists what came to the controller: what advantages are made of, and nothing else with data', async () => {
    const config = ppo({ placement: 'split', steps: 2 });
    await run(config);
    const listed = (await traceOf(config)).filter(({ cat, args }) => cat === 'materialise' && args.step === 2);
    expect(listed.map(({ name }) => name).sort()).toEqual([
      ...['critic.computeValues', 'policy.generateSequences', 'reference.computeLogprobs', 'reward.computeRewards'],
    ]);
    const bytes = listed.reduce((sum, { args }) => sum + (args as unknown as { bytes: number }).bytes, 0);
    expect((await metrics(config))[1]!['bytes.materialised']).toBe(bytes);
  });

  it('gives every pool devices of its own, with its share of the threads, at least one', async () => {
    const opened: DeviceSettings[] = [];
    const backend: Backend = {
      openDevice: (settings) => {
        opened.push(settings);
        return tableBackend.openDevice(settings);
      },
    };
    await run(ppo({ placement: 'standalone', threads: 6, steps: 1 }), { backend });
    expect(opened.map(({ threads }) => threads)).toEqual([2, 2, 1, 1]);
    opened.length = 0;
    await run(ppo({ placement: 'standalone', threads: 1, steps: 1 }), { backend });
    expect(opened.map(({ threads }) => threads)).toEqual([1, 1, 1, 1]);
  });

  it('is added up pool by pool, and refused by the pool that is too large', async () => {
    const config = parseConfig(ppo({ placement: 'split' }));
    const roles = await rolesOf(config);
    const { memory, pools } = preflight(roles, config);
    expect(pools.map(({ pool }) => pool.name)).toEqual(['policy+reference', 'critic+reward']);
    const totals = pools.map(({ pool }) =>
      memory.lines.filter((line) => line.pool === pool.name).reduce((sum, { bytes }) => sum + bytes, 0),
    );
    expect(memory.totalBytes).toBe(Math.max(...totals));
    const together = preflight(roles, { ...config, placement: 'colocated' }).memory;
    expect(together.totalBytes).toBeGreaterThan(memory.totalBytes);
    expect(together.lines.every(({ pool }) => pool === undefined)).toBe(true);
    const tight = (device: number) => () => preflight(roles, { ...config, memory: { ...config.memory, device } });
    expect(tight(memory.totalBytes)).not.toThrow();
    expect(tight(memory.totalBytes - 1)).toThrow(
      expect.objectContaining({
        code: 'MEMORY_BUDGET',
        message: expect.stringMatching(/^pool policy\+reference needs/),
      }),
    );
  });
});

describe('a placement', () => {
  const roles = ['policy', 'critic', 'reference', 'reward'] as const;
  const refused = (placement: Placement, message: RegExp, of: readonly string[] = roles) =>
    expect(() => poolsOf(placement, of)).toThrow(
      expect.objectContaining({ code: 'CONFIG_CONTRADICTION', message: expect.stringMatching(message) }),
    );

  it('names every model of the run once', () => {
    refused([['policy', 'critic', 'reward']], /^placement: reference has no place/);
    refused([['policy'], ['critic', 'reward', 'reference', 'actor']], /^placement: policy is in two places/);
    refused(
      [['policy', 'critc', 'reference', 'reward']],
      /no model critc; did you mean critic\? its models are policy,/,
    );
    refused([['policy', 'critic', 'reference'], ['cost']], /no model cost; /);
    refused('split', /'split' divides models, and this run has one \(policy\)/, ['policy']);
  });

  it('is any division, over any roles', () => {
    const names = (placement: Placement, of: readonly string[] = roles) =>
      poolsOf(placement, of).map(({ name }) => name);
    expect(names('split', ['policy', 'reference', 'reward', 'cost', 'critic', 'costCritic'])).toEqual([
      ...['policy+reference', 'reward+cost+critic+costCritic'],
    ]);
    expect(names('split', ['policy', 'reference'])).toEqual(['policy+reference']);
    expect(names('colocated', ['policy'])).toEqual(['policy']);
    expect(names([['policy']], ['policy'])).toEqual(['policy']);
  });

  it('of another kind is refused with what it may be', async () => {
    expect(() => parseConfig(ppo({ placement: 'spilt' }))).toThrow(
      /placement: expected one of colocated, split, standalone or a list, received "spilt"/,
    );
    await expect(run(ppo({ placement: [['policy'], ['critic', 'reward']] }))).rejects.toMatchObject({
      code: 'CONFIG_CONTRADICTION',
    });
  });
});

describe('a failure', () => {
  it('ends the iteration with the worker, its method and the sample, whatever runs beside it', async () => {
    TableEngine.forwardError = 1e-6;
    try {
      const error = await run(ppo({ placement: 'standalone' })).then(undefined, (reason: unknown) => reason);
      expect(error).toMatchObject({
        code: 'MISMATCH',
        message: expect.stringMatching(/^policy\.update, sample \d+: the trainer's log-prob of sequence \d+/),
        details: { worker: 'policy', method: 'update', pool: 'policy', sequence: expect.any(Number) },
      });
    } finally {
      TableEngine.forwardError = 0;
    }
  });
});

describe('a cancelled run', () => {
  /** Aborts in the middle of call number `calls` of any engine. */
  function cancelling(calls: number): { backend: Backend; cancel: AbortSignal } {
    const controller = new AbortController();
    let left = calls;
    const backend: Backend = {
      openDevice: async (settings) => {
        const device = await tableBackend.openDevice(settings);
        const createEngine: typeof device.createEngine = async (checkpoint, options) => {
          const engine = await device.createEngine(checkpoint, options);
          return new Proxy(engine, {
            get: (target, key) => {
              const value = Reflect.get(target, key, target) as unknown;
              if (!['forwardEach', 'accumulate', 'step', 'generate', 'save'].includes(String(key))) return value;
              return (...args: unknown[]) => {
                if (--left === 0) controller.abort();
                return (value as (...args: unknown[]) => unknown).apply(target, args);
              };
            },
          });
        };
        return { ...device, createEngine };
      },
    };
    return { backend, cancel: controller.signal };
  }

  it.each(['colocated', 'split'])('ends at once and, resumed, is the run never stopped (%s)', async (placement) => {
    const whole = ppo({ placement });
    await run(whole);
    for (const calls of [1, 2, 3, 5, 8, 14, 22, 31, 44, 57]) {
      const parted = ppo({ placement });
      const events = await run(parted, cancelling(calls));
      const last = events.at(-1)!;
      const steps = events.flatMap((event) => (event.type === 'step' ? [event.step] : []));
      expect([calls, last]).toMatchObject([calls, { type: 'interrupted', step: steps.at(-1) ?? 0 }]);
      const saved = await readdir(join(parted.output, 'checkpoints'));
      expect(saved.every((name) => /^step-\d+$/.test(name))).toBe(true);
      await run(parted, { resume: true });
      expect(await checkpoints(parted)).toEqual(await checkpoints(whole));
      expect(await metrics(parted)).toEqual(await metrics(whole));
    }
  });

  it('before it begins, or between two steps, is interrupted as well', async () => {
    const config = ppo();
    const early = await run(config, { cancel: AbortSignal.abort() });
    expect(early.at(-1)).toMatchObject({ type: 'interrupted', step: 0 });
    const controller = new AbortController();
    const events: TrainEvent[] = [];
    const options = { backend: tableBackend, cancel: controller.signal, resume: true };
    for await (const event of train(config as never, options)) {
      events.push(event);
      if (event.type === 'step' && event.step === 3) controller.abort();
    }
    expect(events.at(-1)).toMatchObject({
      type: 'interrupted',
      step: 3,
      checkpoint: expect.stringContaining('000002'),
    });
  });
});
