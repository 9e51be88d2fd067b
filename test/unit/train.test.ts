import { mkdtemp, readdir, readFile, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { afterEach, beforeAll, describe, expect, it } from 'vitest';
import { defineAlgorithm } from '../../src/algorithms/algorithm.js';
import { sftBatch } from '../../src/algorithms/sft.js';
import { crossEntropy } from '../../src/losses/sft.js';
import { valueLoss } from '../../src/losses/value.js';
import type { Config, ConfigInput } from '../../src/train/config.js';
import type { MetricsRow, TrainEvent } from '../../src/train/events.js';
import { type TrainOptions, train } from '../../src/train/train.js';
import { digests } from '../digests.js';
import { TableEngine, tableBackend, writeTableModel } from './train-fake-engine.js';

let model: string;
let scorer: string;
let folder: string;

beforeAll(async () => {
  model = await writeTableModel();
  scorer = await writeTableModel({ architectures: ['LlamaForSequenceClassification'], num_labels: 1 }, 3);
  folder = await mkdtemp(join(tmpdir(), 'lockstep-train-'));
  // A language in which x is followed by x + 1 (of 2..23), and 1 ends.
  const sentence = (i: number) => Array.from({ length: 5 + (i % 4) }, (_, k) => 2 + ((i + k) % 22)).concat(1);
  const rows = (count: number, row: (i: number) => unknown) =>
    Array.from({ length: count }, (_, i) => `${JSON.stringify(row(i))}\n`).join('');
  await writeFile(
    join(folder, 'text.jsonl'),
    rows(30, (i) => ({ tokens: sentence(i) })),
  );
  await writeFile(
    join(folder, 'pairs.jsonl'),
    rows(20, (i) => ({
      prompt: [2 + i],
      chosen: [5, 6, 7],
      rejected: [9, 8, 3 + (i % 5)],
      margin: i % 3 === 0 ? 0.5 : 0,
    })),
  );
  await writeFile(
    join(folder, 'prompts.jsonl'),
    rows(12, (i) => ({ tokens: [2 + i, 3 + i], wanted: 7 })),
  );
  await writeFile(
    join(folder, 'reward.js'),
    'export default (samples) => samples.map(({ tokens, row }) => tokens.filter((t) => t === row.wanted).length / tokens.length);\n',
  );
});

afterEach(() => {
  TableEngine.forwardError = 0;
});

let outputs = 0;
const newOutput = () => join(folder, `run-${outputs++}`);

function sft(changes: Partial<ConfigInput> = {}): ConfigInput {
  return {
    algorithm: 'sft',
    model,
    data: { train: join(folder, 'text.jsonl') },
    dtype: 'float32',
    optimizer: { learningRate: 0.05, weightDecay: 0.01, clipNorm: 1, schedule: 'cosine', warmupSteps: 2 },
    batch: { sequences: 8, microTokens: 32 },
    checkpoint: { every: 3, keep: 2 },
    steps: 11,
    seed: 4,
    output: newOutput(),
    ...changes,
  } as ConfigInput;
}

function reward(changes: Partial<ConfigInput> = {}): ConfigInput {
  return sft({ algorithm: 'reward', data: { train: join(folder, 'pairs.jsonl') }, ...changes } as Partial<ConfigInput>);
}

function ppo(changes: Record<string, unknown> = {}): ConfigInput {
  return sft({
    algorithm: 'ppo',
    data: { train: join(folder, 'prompts.jsonl') },
    optimizer: { learningRate: 0.05, weightDecay: 0 },
    rollout: { samples: 4, maxNewTokens: 6 },
    ppo: { epochs: 2, miniBatches: 2, kl: { controller: 'adaptive' } },
    batch: { sequences: 16, microTokens: 32 },
    reward: { model: scorer },
    checks: { mismatch: 'all' },
    ...changes,
  } as Partial<ConfigInput>);
}

async function run(config: ConfigInput, options: TrainOptions = {}): Promise<TrainEvent[]> {
  const events: TrainEvent[] = [];
  for await (const event of train(config, { backend: tableBackend, ...options })) events.push(event);
  return events;
}

async function metrics(config: ConfigInput): Promise<MetricsRow[]> {
  const text = await readFile(join(config.output!, 'metrics.jsonl'), 'utf8');
  return text
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line) as MetricsRow);
}

const checkpoints = (config: ConfigInput) => digests(join(config.output!, 'checkpoints'));
const withoutTimes = (rows: MetricsRow[]) =>
  rows.map((row) => Object.fromEntries(Object.entries(row).filter(([name]) => !name.startsWith('seconds.'))));

/** Ends the run after `steps` more steps, as an interrupt does. */
async function interruptAfter(config: ConfigInput, steps: number, resume: boolean): Promise<TrainEvent> {
  const controller = new AbortController();
  let last: TrainEvent | undefined;
  let seen = 0;
  for await (const event of train(config, { backend: tableBackend, signal: controller.signal, resume })) {
    last = event;
    if (event.type === 'step' && ++seen === steps) controller.abort();
  }
  return last!;
}

/** Leaves the run after `count` events, as a crash does: without a checkpoint of its own. */
async function crashAfter(config: ConfigInput, count: number, resume: boolean): Promise<void> {
  let seen = 0;
  for await (const _ of train(config, { backend: tableBackend, resume })) if (++seen === count) return;
}

describe.each([
  ['sft', sft],
  ['reward', reward],
  ['ppo', ppo],
] as const)('%s', (_, configure) => {
  it('has one row per step and saves as often as asked, the last step always', async () => {
    const config = configure();
    const events = await run(config);
    expect(events[0]).toMatchObject({ type: 'start', step: 0, steps: 11 });
    expect(events.at(-1)).toMatchObject({ type: 'done', step: 11 });
    expect(events.filter(({ type }) => type === 'checkpoint').map(({ step }) => step)).toEqual([3, 6, 9, 11]);
    expect((await metrics(config)).map(({ step }) => step)).toEqual([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    expect(await readdir(join(config.output!, 'checkpoints'))).toEqual(['step-000009', 'step-000011']);
    for (const row of await metrics(config)) {
      expect(Object.values(row).every(Number.isFinite)).toBe(true);
      expect(row).toMatchObject({
        loss: expect.any(Number),
        'gradient.norm': expect.any(Number),
        learningRate: expect.any(Number),
      });
      expect(Object.keys(row)).toContain('seconds.step');
    }
  });

  it('gives the same bytes for the same configuration, and others for another seed', async () => {
    const [a, b, c] = [configure(), configure(), configure({ seed: 5 })];
    await run(a);
    await run(b);
    await run(c);
    expect(await checkpoints(a)).toEqual(await checkpoints(b));
    expect(withoutTimes(await metrics(a))).toEqual(withoutTimes(await metrics(b)));
    expect(await checkpoints(c)).not.toEqual(await checkpoints(a));
  });

  it('interrupted and resumed is the run never stopped', async () => {
    const whole = configure({ checkpoint: { every: 3, keep: 100 } });
    await run(whole);
    const parted = configure({ checkpoint: { every: 3, keep: 100 } });
    expect(await interruptAfter(parted, 4, false)).toMatchObject({ type: 'interrupted', step: 4 });
    expect(await interruptAfter(parted, 1, true)).toMatchObject({ type: 'interrupted', step: 5 });
    const events = await run(parted, { resume: true });
    expect(events[0]).toMatchObject({ type: 'start', step: 5, resumedFrom: expect.stringContaining('step-000005') });
    const [a, b] = [await checkpoints(whole), await checkpoints(parted)];
    for (const [file, digest] of Object.entries(a)) expect([file, b[file]]).toEqual([file, digest]);
    expect(withoutTimes(await metrics(parted))).toEqual(withoutTimes(await metrics(whole)));
  });

  it('crashed at any event and resumed is the run never stopped', async () => {
    const whole = configure();
    await run(whole);
    const parted = configure();
    let resume = false;
    for (const events of [1, 5, 3, 6]) {
      await crashAfter(parted, events, resume);
      resume = true;
    }
    await run(parted, { resume: true });
    expect(await checkpoints(parted)).toEqual(await checkpoints(whole));
    expect(withoutTimes(await metrics(parted))).toEqual(withoutTimes(await metrics(whole)));
  });

  it('changes no bit with the size of micro-batches', async () => {
    const [a, b] = [configure(), configure({ batch: { sequences: 16, microTokens: 4096 } })];
    const { microTokens: _unused, ...batch } = a.batch!;
    await run({ ...a, batch: { ...batch, sequences: 16, microTokens: 24 } } as ConfigInput);
    await run(b);
    const [x, y] = [await checkpoints(a), await checkpoints(b)];
    for (const file of Object.keys(x).filter((name) => name.endsWith('.safetensors'))) {
      expect([file, y[file]]).toEqual([file, x[file]]);
    }
  });
});

describe('learning', () => {
  it('sft lowers the loss towards that of the language', async () => {
    const config = sft({ steps: 60, optimizer: { learningRate: 0.05, weightDecay: 0 } });
    await run(config);
    const rows = await metrics(config);
    expect(rows[0]!.loss).toBeGreaterThan(2.5);
    expect(rows.at(-1)!.loss).toBeLessThan(0.8);
  });

  it('a reward model learns to order pairs', async () => {
    const config = reward({ steps: 30, optimizer: { learningRate: 0.05, weightDecay: 0 } });
    await run(config);
    const rows = await metrics(config);
    expect(rows.at(-1)!.loss).toBeLessThan(0.2);
    expect(rows.at(-1)!['reward.accuracy']).toBe(1);
  });

  it('ppo raises the reward', async () => {
    const config = ppo({ steps: 25, batch: { sequences: 48 }, ppo: { epochs: 2, miniBatches: 2, klCoefficient: 0 } });
    await run(config);
    const rows = await metrics(config);
    const mean = (part: MetricsRow[]) => part.reduce((sum, row) => sum + row['reward.mean']!, 0) / part.length;
    expect(mean(rows.slice(0, 5))).toBeLessThan(0.15);
    expect(mean(rows.slice(-5))).toBeGreaterThan(0.4);
  });

  it('the rewards of a model and of a function are added', async () => {
    const [ofModel, ofFunction, both] = await Promise.all(
      [
        { model: scorer },
        { function: join(folder, 'reward.js') },
        { model: scorer, function: join(folder, 'reward.js') },
      ].map(async (given) => (await metrics(await ran(ppo({ reward: given, steps: 1 }))))[0]!['reward.mean']!),
    );
    expect(ofFunction).toBeGreaterThan(0);
    expect(both).toBeCloseTo(ofModel! + ofFunction!, 5);
  });

  it('terms are added by their weights, and each has a metric of its own', async () => {
    const weighted = [
      { model: scorer, weight: 0.5 },
      { function: join(folder, 'reward.js'), weight: 2, threads: 2, batchSize: 3 },
      { length: { target: 3 }, name: 'brevity', weight: 0 },
    ];
    const [row] = await metrics(await ran(ppo({ reward: weighted, steps: 1 })));
    const alone = async (given: unknown) =>
      (await metrics(await ran(ppo({ reward: given, steps: 1 }))))[0]!['reward.mean']!;
    expect(row!['reward.model']).toBeCloseTo(await alone({ model: scorer }), 5);
    expect(row!['reward.function']).toBeCloseTo(await alone({ function: join(folder, 'reward.js') }), 5);
    expect(row!['reward.brevity']).toBeCloseTo(await alone({ length: { target: 3 } }), 5);
    expect(row!['reward.brevity']).toBeLessThan(0);
    expect(row!['reward.mean']).toBeCloseTo(0.5 * row!['reward.model']! + 2 * row!['reward.function']!, 5);
  });

  it('so are those of a cost, by its model and otherwise, in steps and in evaluations', async () => {
    const file = join(folder, 'prompts.jsonl');
    const config = sft({
      ...{ algorithm: 'safe-rlhf', data: { train: file, eval: file }, steps: 1, optimizer: {} },
      ...{ rollout: { maxNewTokens: 6 }, batch: { sequences: 16, microTokens: 32 } },
      reward: { model: scorer },
      cost: [{ model: scorer, weight: 3 }, { length: { target: 3 } }],
    } as Partial<ConfigInput>);
    const [, row] = await metrics(await ran(config));
    for (const prefix of ['', 'eval.']) {
      const [ofModel, ofLength] = [row![`${prefix}cost.model`]!, row![`${prefix}cost.length`]!];
      expect(ofModel).toBeCloseTo(row![`${prefix}reward.mean`]!, 12);
      expect(ofLength).toBeLessThan(0);
      expect(row![`${prefix}cost.mean`]).toBeCloseTo(3 * ofModel + ofLength, 5);
    }
  });

  it('a run goes on with the rewards it began with, in any form, and not with others', async () => {
    const file = join(folder, 'reward.js');
    const config = await ran(ppo({ reward: { model: scorer, function: file }, steps: 3 }));
    const listed = [{ model: scorer }, { function: file, timeoutSeconds: 90 }];
    await run({ ...config, reward: listed, steps: 4 } as ConfigInput, { resume: true });
    const shared = [{ model: scorer }, { function: file, threads: 2 }];
    await expect(run({ ...config, reward: shared, steps: 5 } as ConfigInput, { resume: true })).rejects.toMatchObject({
      code: 'RUN_CONFIG_DIFFERS',
      details: { path: 'reward.1.threads', before: 1, now: 2 },
    });
    const heavier = [{ model: scorer }, { function: file, weight: 2 }];
    await expect(run({ ...config, reward: heavier, steps: 5 } as ConfigInput, { resume: true })).rejects.toMatchObject({
      code: 'RUN_CONFIG_DIFFERS',
      details: { path: 'reward.1.weight', before: 1, now: 2 },
    });
  });

  it('ppo takes a reward model that was trained here', async () => {
    const scoring = await ran(reward({ steps: 3 }));
    const rows = await metrics(
      await ran(ppo({ reward: { model: join(scoring.output!, 'checkpoints', 'step-000003') }, steps: 1 })),
    );
    expect(rows[0]).toHaveProperty('reward.model');
  });
});

async function ran(config: ConfigInput): Promise<ConfigInput> {
  await run(config);
  return config;
}

describe('a ppo run', () => {
  it('reports the metrics of the contract', async () => {
    const [row] = await metrics(await ran(ppo({ steps: 1 })));
    expect(Object.keys(row!)).toEqual(
      expect.arrayContaining([
        'step',
        'loss',
        'reward.mean',
        'reward.model',
        'kl.mean',
        'value.loss',
        'value.explained',
        'policy.loss',
        'policy.clipFraction',
        'policy.kl',
        'entropy',
        'response.length',
        'response.truncated',
        'gradient.norm',
        'learningRate',
        'mismatch.max',
        'mismatch.tokens',
        'tokens',
        'seconds.generation',
        'seconds.values',
        'seconds.reference',
        'seconds.policyUpdate',
        'seconds.valueUpdate',
        'seconds.reward',
        'seconds.native',
      ]),
    );
  });

  it('compares every sampled token with mismatch: all, and the first mini-batch otherwise', async () => {
    const [all] = await metrics(await ran(ppo({ steps: 1 })));
    expect(all).toMatchObject({ 'mismatch.max': 0, 'mismatch.tokens': 16 * all!['response.length']! });
    const [first] = await metrics(await ran(ppo({ steps: 1, checks: { mismatch: 'first' } })));
    expect(first!['mismatch.tokens']).toBeGreaterThan(0);
    expect(first!['mismatch.tokens']).toBeLessThan(all!['mismatch.tokens']!);
  });

  it('starts every update at ratio 1 with nothing clipped', async () => {
    const rows = await metrics(await ran(ppo({ steps: 3, ppo: { epochs: 1, miniBatches: 1 } })));
    for (const row of rows) expect(row).toMatchObject({ 'policy.clipFraction': 0, 'policy.kl': 0 });
  });

  it.each(['first', 'all'])('stops at the first token that differs (mismatch: %s)', async (mismatch) => {
    TableEngine.forwardError = 1e-6;
    await expect(run(ppo({ checks: { mismatch } }))).rejects.toMatchObject({
      code: 'MISMATCH',
      details: { sequence: expect.any(Number), position: expect.any(Number), token: expect.any(Number) },
      message: expect.stringMatching(/sequence \d+, position \d+, token \d+ is -[\d.]+, but the rollout's was -[\d.]+/),
    });
  });

  it('keeps texts of rollouts, and of evaluations before and while training', async () => {
    const config = ppo({
      steps: 4,
      data: { train: join(folder, 'prompts.jsonl'), eval: join(folder, 'prompts.jsonl') },
      evaluation: { every: 2, samples: 3 },
    });
    const events = await run(config);
    expect(events.filter(({ type }) => type === 'evaluation').map(({ step }) => step)).toEqual([0, 2, 4]);
    expect(await readdir(join(config.output!, 'rollouts'))).toEqual([
      'eval-000000.jsonl',
      'eval-000002.jsonl',
      'eval-000004.jsonl',
      'step-000001.jsonl',
      'step-000002.jsonl',
      'step-000003.jsonl',
      'step-000004.jsonl',
    ]);
    const [before, first, second] = await metrics(config);
    expect(Object.keys(before!).filter((name) => !name.startsWith('seconds.'))).toEqual([
      'step',
      'eval.reward.mean',
      'eval.reward.model',
      'eval.response.length',
      'eval.response.truncated',
      'eval.response.empty',
      'bytes.materialised',
    ]);
    expect(first).not.toHaveProperty('eval.reward.mean');
    expect(second).toHaveProperty('eval.reward.mean');
    const lines = (await readFile(join(config.output!, 'rollouts', 'eval-000000.jsonl'), 'utf8')).trim().split('\n');
    expect(lines).toHaveLength(3);
    expect(JSON.parse(lines[1]!)).toMatchObject({
      index: 1,
      promptTokens: [3, 4],
      reward: expect.any(Number),
      finish: expect.any(String),
    });
  });

  it('warns of a truncated sampling distribution', async () => {
    const events = await run(ppo({ steps: 1, rollout: { samples: 4, maxNewTokens: 3, topP: 0.9 } }));
    expect(events).toContainEqual(expect.objectContaining({ type: 'warning', code: 'SAMPLING_BIAS' }));
  });

  it('counts truncated answers, and can leave them out or charge them', async () => {
    const keep = (await metrics(await ran(ppo({ steps: 1 }))))[0]!;
    const rollout = { samples: 4, maxNewTokens: 6 };
    const charged = (
      await metrics(await ran(ppo({ steps: 1, rollout: { ...rollout, truncation: 'penalise', truncationPenalty: 2 } })))
    )[0]!;
    expect(keep['response.truncated']).toBeGreaterThan(0);
    expect(charged['reward.mean']).toBeCloseTo(keep['reward.mean']! - 2 * keep['response.truncated']!, 6);
    expect(charged['reward.model']).toBe(keep['reward.model']);
  });

  it('is stopped by a reward that throws, with the sample named', async () => {
    await writeFile(join(folder, 'throws.js'), 'export default () => { throw new Error("no idea"); };\n');
    await expect(run(ppo({ reward: { function: join(folder, 'throws.js') } }))).rejects.toMatchObject({
      code: 'REWARD_THREW',
    });
  });

  it('is stopped by a term that fails, while another would run for ever', async () => {
    await writeFile(join(folder, 'hangs.js'), 'export default () => { for (;;); };\n');
    await writeFile(join(folder, 'throws.js'), 'export default () => { throw new Error("no idea"); };\n');
    const reward = [
      { function: join(folder, 'hangs.js'), timeoutSeconds: 1000 },
      { function: join(folder, 'throws.js'), name: 'bad' },
    ];
    await expect(run(ppo({ reward }))).rejects.toThrow(/throws\.js \(thread 1 of 1\), on samples? 0 .*no idea/);
  });

  it.each<[string, object]>([
    ['exact', { column: 'wanted' }],
    ['numeric', { column: 'wanted' }],
    ['boxed', { column: 'wanted' }],
    ['regex', { pattern: '7' }],
    ['jsonSchema', { schema: true }],
    ['cosine', { max: 6, answer: { exact: { column: 'wanted' } } }],
  ])('refuses rewards of texts that a model without a tokenizer cannot give: %s', async (kind, settings) => {
    await expect(run(ppo({ reward: [{ [kind]: settings }] }))).rejects.toMatchObject({
      code: 'REWARD_TOKENIZER',
      details: { reward: kind },
    });
  });

  it.each(['signal', 'cancel'] as const)('is ended by the %s while a reward loads', async (which) => {
    const path = join(folder, 'never-loads.mjs');
    await writeFile(path, 'for (;;);');
    const controller = new AbortController();
    setTimeout(() => controller.abort(), 1000);
    const config = ppo({ reward: { function: path } });
    const events = await run(config, { [which]: controller.signal });
    expect(events).toEqual([{ type: 'interrupted', step: 0, output: config.output }]);
    expect(await readdir(folder)).not.toContain(basename(config.output!));
  });

  it('refuses models of another vocabulary, and a reward model without a score head', async () => {
    const other = await writeTableModel({ vocab_size: 25 });
    await expect(run(ppo({ reference: { model: other } }))).rejects.toMatchObject({ code: 'MODEL_VOCABULARY' });
    await expect(run(ppo({ reward: { model } }))).rejects.toMatchObject({ code: 'MODEL_HEAD' });
  });
});

it('losses that an algorithm asks for are calls of their models; without an update nothing was compared', async () => {
  const algorithm = defineAlgorithm({
    models: ['actor', 'critic'],
    async iterate({ actor, critic }, prompts) {
      const batch = sftBatch(prompts.map(({ tokens }) => ({ tokens, mask: [0, 1] })));
      const zeros = new Float32Array(batch.tokens.length);
      const ofValues = { ...batch, columns: { ...batch.columns, oldValues: zeros, returns: zeros } };
      const losses = [actor.computeLoss(batch, crossEntropy()), critic.computeLoss(ofValues, valueLoss({}))];
      const [policy, value] = await Promise.all(losses);
      return { metrics: { policy: policy!.loss, value: value!.loss } };
    },
  });
  const config = ppo({ steps: 1 });
  await run(config, { algorithm });
  const [row] = await metrics(config);
  expect(Object.keys(row!)).toEqual(expect.arrayContaining(['policy', 'seconds.logprobs', 'seconds.values']));
  expect(Object.keys(row!).filter((name) => name.startsWith('mismatch'))).toEqual([]);
});

describe('a program', () => {
  const iterate = 'iterate() {}, state() {}, restore() {}';
  it.each([
    ['{}', 'it has no list of models'],
    ['undefined', 'it is undefined'],
    [
      `{ models: ['actor', 'critik'], ${iterate} }`,
      'there is no model critik, did you mean critic? (models are actor,',
    ],
    [`{ models: ['critic'], ${iterate} }`, 'its models lack the actor'],
    [`() => ({ models: ['actor'] })`, 'it has no function iterate'],
    [`{ models: ['actor'], iterate() {} }`, 'it has no function state'],
  ])('that exports %s is refused with the reason', async (text, message) => {
    const program = join(folder, `program-${outputs++}.mjs`);
    await writeFile(program, `export default ${text};\n`);
    const error = await run(ppo({ program })).catch((reason: unknown) => reason);
    expect(error).toMatchObject({ code: 'PROGRAM_EXPORT', message: expect.stringContaining(message) });
  });

  it.each([
    ['teacher', 'grpo', 'distillation'],
    ['cost', 'ppo', 'safe-rlhf'],
    ['reward', 'distillation', 'ppo, remax, safe-rlhf, grpo, rloo, reinforce++'],
  ] as const)(
    'that uses a %s where %s has none is refused before a model is opened',
    async (name, algorithm, having) => {
      const {
        ppo: _,
        reward,
        ...common
      } = ppo({ model: join(folder, 'nowhere') }) as unknown as Record<string, unknown>;
      const named = algorithm === 'distillation' ? { teacher: { model } } : { reward };
      const program = { ...defineAlgorithm({ models: ['actor', name], iterate: async () => ({ metrics: {} }) }) };
      const error = await run({ ...common, algorithm, ...named } as never, { algorithm: program }).catch((e) => e);
      expect(error).toMatchObject({ code: 'PROGRAM_MODELS', details: { model: name, algorithm } });
      expect(error.message).toContain(`one with the key ${name}: ${having}`);
    },
  );

  it.each(['reward', 'teacher'] as const)('without the %s is evaluated by it', async (name) => {
    const { ppo: _, reward, ...common } = ppo({ steps: 1 }) as unknown as Record<string, unknown>;
    const named = name === 'teacher' ? { algorithm: 'distillation', teacher: { model } } : { algorithm: 'ppo', reward };
    const prompts = join(folder, 'prompts.jsonl');
    const config = { ...common, ...named, data: { train: prompts, eval: prompts } } as unknown as ConfigInput;
    const algorithm = defineAlgorithm({ models: ['actor'], iterate: async () => ({ metrics: {} }) });
    await run(config, { algorithm });
    expect((await metrics(config)).map((row) => row['eval.reward.mean'])).toEqual([0, 1].map(() => expect.any(Number)));
  });
});

it('updates of any shape are counted through a resume; those of the configuration need no count', async () => {
  const algorithm = defineAlgorithm({
    models: ['actor'],
    async iterate({ actor }, prompts, { iteration }) {
      const batch = sftBatch(prompts.map(({ tokens }) => ({ tokens, mask: Array.from(tokens, () => 1) })));
      const update = { epochs: iteration === 1 ? 4 : 1, miniBatches: 2, iteration };
      await actor.update(batch, crossEntropy(), update);
      if (iteration === 2) await actor.update(batch, crossEntropy(), update);
      return { metrics: {} };
    },
  });
  const counts = async (config: ConfigInput, step: number) => {
    const path = join(config.output!, 'checkpoints', `step-00000${step}`, 'trainer', 'state.json');
    return (JSON.parse(await readFile(path, 'utf8')) as { counts?: unknown }).counts;
  };
  const changes = { ppo: { epochs: 4, miniBatches: 2 }, checkpoint: { every: 1, keep: 9 }, steps: 4 };
  const [whole, parted] = [ppo(changes), ppo(changes)];
  await run(whole, { algorithm });
  for (const steps of [1, 2, 4]) await run({ ...parted, steps }, { algorithm, resume: true });
  expect(await checkpoints(parted)).toEqual(await checkpoints(whole));
  expect(await counts(whole, 1)).toBeUndefined();
  expect(await counts(whole, 2)).toEqual({ policy: { updates: 12, passes: 6 } });
  expect(await counts(whole, 4)).toEqual({ policy: { updates: 16, passes: 8 } });
});

describe('an algorithm that draws prompts', () => {
  /** Draws one prompt after the batch, and notes the first tokens of all. */
  const drawing = () => {
    const seen: number[] = [];
    const algorithm = defineAlgorithm({
      models: ['actor'],
      async iterate(_, prompts, { draw }) {
        const drawn = await draw!(1);
        seen.push(...[...prompts, ...drawn].map(({ tokens }) => tokens[0]!));
        return { metrics: {} };
      },
    });
    return { seen, algorithm };
  };
  const config = (changes: Record<string, unknown> = {}) =>
    ppo({
      ...{ rollout: { maxNewTokens: 6 }, batch: { sequences: 2 }, ppo: { miniBatches: 1 } },
      ...{ reward: { function: join(folder, 'reward.js') }, steps: 4, ...changes },
    });

  it('has each prompt once in a pass over the data, also when it is resumed', async () => {
    const whole = drawing();
    await run(config(), { algorithm: whole.algorithm });
    expect([...whole.seen].sort((a, b) => a - b)).toEqual(Array.from({ length: 12 }, (_, i) => 2 + i));
    const parts = drawing();
    const output = newOutput();
    await run(config({ output, steps: 2 }), { algorithm: parts.algorithm });
    await run(config({ output }), { algorithm: parts.algorithm, resume: true });
    expect(parts.seen).toEqual(whole.seen);
  });

  it('samples other prompts for groups that teach nothing, and goes on with the prompts after them', async () => {
    const configure = () =>
      sft({
        ...{ algorithm: 'grpo', grpo: { samplingRounds: 3 }, data: { train: join(folder, 'prompts.jsonl') } },
        ...{ batch: { sequences: 4 }, rollout: { samples: 2, maxNewTokens: 2 } },
        ...{ reward: { function: join(folder, 'reward.js') }, steps: 6, checkpoint: { every: 1, keep: 100 } },
      } as Partial<ConfigInput>);
    const [whole, parted] = [configure(), configure()];
    await run(whole);
    expect((await metrics(whole)).slice(0, 3).some((row) => row['groups.rounds']! > 1)).toBe(true);
    await interruptAfter(parted, 3, false);
    await run(parted, { resume: true });
    expect(withoutTimes(await metrics(parted))).toEqual(withoutTimes(await metrics(whole)));
    expect(await checkpoints(parted)).toEqual(await checkpoints(whole));
  });

  it('gets as many as it asks for where bad rows are skipped', async () => {
    const train = join(folder, 'some-bad.jsonl');
    // No token 99: rows that can be read, but not used.
    const rows = [[2], [3], [99], [99], [4], [5], [99], [99], [99], [6]];
    await writeFile(train, rows.map((tokens) => `${JSON.stringify({ tokens })}\n`).join(''));
    const { seen, algorithm } = drawing();
    await run(config({ data: { train, shuffle: false, onError: 'skip' }, steps: 2 }), { algorithm });
    expect(seen).toEqual([2, 3, 4, 5, 6]);
  });
});

describe('an sft run', () => {
  it('evaluates before training, every n steps and at the end', async () => {
    const config = sft({
      data: { train: join(folder, 'text.jsonl'), eval: join(folder, 'text.jsonl') },
      evaluation: { every: 5, samples: 2 },
      rollout: { maxNewTokens: 4 },
    } as Partial<ConfigInput>);
    await run(config);
    const rows = await metrics(config);
    expect(rows.filter((row) => 'eval.loss' in row).map(({ step }) => step)).toEqual([0, 5, 10, 11]);
    expect(rows[0]!['eval.loss']).toBeGreaterThan(rows.at(-1)!['eval.loss']!);
  });

  it('follows the schedule', async () => {
    const rows = await metrics(await ran(sft({ steps: 3, optimizer: { learningRate: 0.3, schedule: 'linear' } })));
    expect(rows.map(({ learningRate }) => learningRate)).toEqual([
      0.3,
      expect.closeTo(0.2, 12),
      expect.closeTo(0.1, 12),
    ]);
  });

  it('names a row with nothing to learn, a token outside the vocabulary, a row beyond the positions', async () => {
    const path = join(folder, 'bad.jsonl');
    for (const [row, code] of [
      [{ tokens: [3] }, 'DATA_BAD_ROW'],
      [{ tokens: [3, 24] }, 'TOKEN_OUT_OF_RANGE'],
      [{ tokens: Array(65).fill(3) }, 'DATA_BAD_ROW'],
    ] as const) {
      await writeFile(path, `{"tokens":[1,2,3]}\n${JSON.stringify(row)}\n`);
      await expect(run(sft({ data: { train: path, shuffle: false } }))).rejects.toMatchObject({
        code,
        message: expect.stringContaining('line 2'),
      });
    }
  });

  it('skips bad rows when told to, counts them and says so', async () => {
    const path = join(folder, 'some-bad.jsonl');
    await writeFile(path, '{"tokens":[1,2,3]}\n{oops\n{"tokens":[3,99]}\n{"tokens":[4,5,6]}\n');
    const config = sft({ data: { train: path, onError: 'skip' }, steps: 2 });
    const events = await run(config);
    expect(events.find(({ type }) => type === 'warning')).toMatchObject({ code: 'DATA_SKIPPED' });
    expect((await metrics(config))[0]!['data.skipped']).toBeGreaterThan(1);
  });

  it.each([
    ['sft', sft, 2],
    ['ppo', ppo, 8],
  ] as const)(
    '%s counts a row that it skips once, in all passes and when it is resumed',
    async (_, make, sequences) => {
      const train = join(folder, 'some-unusable.jsonl');
      await writeFile(train, '{oops\n{"tokens":[3,99]}\n{"tokens":[1,2,3]}\n{"tokens":[4,5,6]}\n{"tokens":[7,99]}\n');
      const changes = { batch: { sequences }, data: { train, shuffle: false, onError: 'skip' }, steps: 5 } as const;
      const [whole, stopped] = [make(changes), make(changes)];
      await run(whole);
      await interruptAfter(stopped, 1, false);
      await run(stopped, { resume: true });
      const [counts, resumed] = await Promise.all(
        [whole, stopped].map(async (config) => (await metrics(config)).map((row) => row['data.skipped'])),
      );
      expect(counts).toEqual([2, 3, undefined, undefined, undefined]);
      expect(resumed).toEqual(counts);
      expect(await checkpoints(stopped)).toEqual(await checkpoints(whole));
    },
  );

  it('refuses what does not fit, with the arithmetic', async () => {
    await expect(run(sft({ memory: { device: 1000 } }))).rejects.toMatchObject({
      code: 'MEMORY_BUDGET',
      message: expect.stringMatching(/policy: weights[\s\S]*policy: optimizer[\s\S]*workspace/),
    });
  });

  it('leaves no folder behind when it cannot begin', async () => {
    const config = sft({ data: { train: join(folder, 'absent.jsonl') } });
    await expect(run(config)).rejects.toMatchObject({ code: 'DATA_FILE_MISSING' });
    expect(await readdir(folder)).not.toContain(config.output!.split('/').at(-1));
  });
});

describe('resume', () => {
  it('refuses a folder that holds a run, unless told to', async () => {
    const config = await ran(sft({ steps: 2 }));
    await expect(run(config)).rejects.toMatchObject({ code: 'RUN_EXISTS' });
    expect((await run(config, { resume: true })).map(({ type }) => type)).toEqual(['start', 'done']);
  });

  it('goes on for more steps at a constant rate', async () => {
    const optimizer = { learningRate: 0.01 };
    const config = await ran(sft({ steps: 3, optimizer }));
    await run({ ...config, steps: 5 } as ConfigInput, { resume: true });
    const whole = await ran(sft({ steps: 5, optimizer }));
    const last = async (c: ConfigInput) => digests(join(c.output!, 'checkpoints', 'step-000005'));
    expect(await last(config)).toEqual(await last(whole));
  });

  it.each([
    [{ optimizer: { learningRate: 0.06 } }, 'optimizer.learningRate was 0.05 and is now 0.06'],
    [{ seed: 9 }, 'seed was 4 and is now 9'],
    [{ steps: 12 }, 'steps was 11 and is now 12'],
    [{ batch: { sequences: 4 } }, 'batch.sequences was 8 and is now 4'],
    [{ algorithm: 'reward', data: { train: 'pairs.jsonl' } }, 'algorithm was "sft" and is now "reward"'],
  ])('refuses another configuration and names the key: %j', async (change, message) => {
    const config = sft();
    await interruptAfter(config, 1, false);
    const changed = { ...config, ...change, optimizer: { ...config.optimizer, ...(change as Config).optimizer } };
    await expect(run(changed as ConfigInput, { resume: true })).rejects.toMatchObject({
      code: 'RUN_CONFIG_DIFFERS',
      message: expect.stringContaining(message),
    });
  });

  it('refuses other data, and a checkpoint of another model', async () => {
    const config = sft();
    await interruptAfter(config, 1, false);
    const moved = { ...config, data: { train: join(folder, 'prompts.jsonl') } } as ConfigInput;
    await expect(run(moved, { resume: true })).rejects.toThrow(/data\.train was/);
    const wider = sft({ model: await writeTableModel({ hidden_size: 16 }), output: newOutput() });
    await interruptAfter(wider, 1, false);
    const yaml = join(wider.output!, 'config.yaml');
    await writeFile(yaml, (await readFile(yaml, 'utf8')).replace(/^model: .*$/m, `model: ${model}`));
    await expect(run({ ...wider, model } as ConfigInput, { resume: true })).rejects.toMatchObject({
      code: 'CHECKPOINT_OTHER_MODEL',
      message: expect.stringContaining('width is 16'),
    });
  });

  it('from nothing at all begins at the beginning', async () => {
    const config = sft({ steps: 2 });
    const events = await run(config, { resume: true });
    expect(events[0]).toMatchObject({ type: 'start', step: 0 });
    expect(events.at(-1)).toMatchObject({ type: 'done' });
  });

  it('says which state file is damaged', async () => {
    const config = sft();
    await interruptAfter(config, 1, false);
    await writeFile(join(config.output!, 'checkpoints', 'step-000001', 'trainer', 'state.json'), '{');
    await expect(run(config, { resume: true })).rejects.toMatchObject({ code: 'CHECKPOINT_CORRUPT' });
  });
});

describe('checkpoints', () => {
  it('hold nothing that depends on paths or on time', async () => {
    const config = await ran(ppo({ steps: 1 }));
    const root = join(config.output!, 'checkpoints', 'step-000001');
    for (const file of Object.keys(await digests(root))) {
      const text = (await readFile(join(root, file))).toString('latin1');
      expect(text).not.toContain(folder);
      expect(text).not.toContain(model);
    }
  });

  it('of a ppo run hold policy and critic as Hugging Face folders', async () => {
    const config = await ran(ppo({ steps: 1 }));
    const root = join(config.output!, 'checkpoints', 'step-000001');
    const architectures = async (path: string) =>
      JSON.parse(await readFile(join(root, path, 'config.json'), 'utf8')).architectures;
    expect([await architectures('.'), await architectures('critic')]).toEqual([
      ['LlamaForCausalLM'],
      ['LlamaForTokenClassification'],
    ]);
    expect((await readdir(join(root, 'trainer'))).sort()).toEqual(['critic', 'policy', 'state.json']);
  });

  it('of a reward run are sequence classifiers with one label', async () => {
    const config = await ran(reward({ steps: 2 }));
    const json = JSON.parse(await readFile(join(config.output!, 'checkpoints', 'step-000002', 'config.json'), 'utf8'));
    expect(json.architectures).toEqual(['LlamaForSequenceClassification']);
  });
});
