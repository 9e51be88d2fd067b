/** What holds for a run of every algorithm, from its configuration to its report. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { chartsOf } from '../../src/reports/catalogue.js';
import { readRun } from '../../src/reports/run-record.js';
import { metricNames } from '../../src/reports/series.js';
import { summariseRun } from '../../src/reports/summary.js';
import { type AlgorithmName, algorithms } from '../../src/train/schema.js';
import { train } from '../../src/train/train.js';
import { tableBackend, writeTableModel } from './train-fake-engine.js';

let folder: string;
let settings: Record<AlgorithmName, object>;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'every-algorithm-'));
  const model = await writeTableModel();
  const scorer = await writeTableModel({ architectures: ['LlamaForSequenceClassification'], num_labels: 1 }, 3);
  const rows = (name: string, row: (i: number) => object) => {
    const file = join(folder, name);
    const text = Array.from({ length: 8 }, (_, i) => `${JSON.stringify(row(i))}\n`).join('');
    return writeFile(file, text).then(() => ({ model, data: { train: file, eval: file } }));
  };
  const pair = (i: number) => ({ prompt: [2, 3 + i], chosen: [5, 6], rejected: [9, 8, 3 + (i % 5)] });
  const texts = await rows('texts.jsonl', (i) => ({ tokens: [2, 3, 4 + i, 1] }));
  const pairs = await rows('pairs.jsonl', pair);
  const safety = await rows('safety.jsonl', (i) => ({ ...pair(i), unsafe: [i % 3 === 0, true] }));
  const judged = await rows('judged.jsonl', (i) => ({
    ...{ tokens: [2, 3 + i, 5, 6], mask: [0, 0, 1, 1], desirable: i % 2 === 0 },
  }));
  const prompts = await rows('prompts.jsonl', (i) => ({ tokens: [2 + i, 3 + i] }));
  const reward = [{ model: scorer }, { length: { target: 3 } }];
  const rollout = { maxNewTokens: 5 };
  const sampled = { ...prompts, reward, rollout };
  const groups = { ...sampled, rollout: { ...rollout, samples: 4 } };
  const ptx = { data: join(folder, 'texts.jsonl') };
  settings = {
    sft: { ...texts, rollout },
    reward: pairs,
    cost: safety,
    ppo: { ...sampled, ptx, ppo: { miniBatches: 2, kl: { controller: 'adaptive' } } },
    remax: { ...groups, remax: {} },
    'safe-rlhf': { ...sampled, cost: reward, 'safe-rlhf': { miniBatches: 2 } },
    grpo: { ...groups, grpo: { samplingRounds: 2 } },
    rloo: groups,
    'reinforce++': groups,
    distillation: { ...prompts, rollout, teacher: { model } },
    dpo: { ...pairs, rollout },
    simpo: { ...pairs, rollout },
    orpo: { ...pairs, rollout },
    kto: { ...judged, rollout },
  };
});

afterAll(() => rm(folder, { recursive: true }));

/** Shown by other means than a chart: in the health of the run, and where the time goes. */
const withoutChart = /^(mismatch\.(max|tokens)|seconds\..*)$/;
/** A surrogate, which is drawn without what is added to it. */
const ofPolicies = ['loss'];

const headlines: Record<AlgorithmName, string[]> = {
  sft: ['loss', 'eval.loss'],
  reward: ['eval.reward.accuracy', 'reward.accuracy'],
  cost: ['eval.reward.accuracy', 'reward.accuracy'],
  ppo: ['reward.mean', 'kl.mean'],
  remax: ['reward.mean', 'reward.greedy'],
  'safe-rlhf': ['reward.mean', 'cost.mean', 'cost.multiplier'],
  grpo: ['reward.mean', 'kl.mean', 'groups.equal'],
  rloo: ['reward.mean', 'kl.mean', 'groups.equal'],
  'reinforce++': ['reward.mean', 'kl.mean'],
  distillation: ['reward.mean', 'kl.mean'],
  dpo: ['eval.reward.accuracy', 'reward.accuracy', 'eval.reward.margin'],
  simpo: ['eval.reward.accuracy', 'reward.accuracy', 'eval.reward.margin'],
  orpo: ['eval.reward.accuracy', 'reward.accuracy', 'eval.reward.margin'],
  kto: ['eval.reward.margin', 'reward.margin', 'loss'],
};

describe.each(algorithms)('a run of %s', (algorithm) => {
  it('keeps what its policy says to prompts of evaluations, and reports what it measures', async () => {
    const output = join(folder, algorithm);
    const common = { algorithm, output, dtype: 'float32', steps: 2, batch: { sequences: 8, microTokens: 64 } };
    const config = { ...common, evaluation: { every: 1, samples: 3 }, ...settings[algorithm] };
    for await (const _ of train(config as never, { backend: tableBackend }));
    const run = await readRun(output);

    const kept = run.evaluations.map(({ step, samples }) => [step, samples.length]);
    const scores = algorithm === 'reward' || algorithm === 'cost';
    expect(kept).toEqual([0, 2].map((step) => [step, scores ? 0 : 3]));

    const names = metricNames(run.rows);
    const { headline } = summariseRun(run);
    expect(headline.slice(0, headlines[algorithm].length)).toEqual(headlines[algorithm]);

    // Every metric with a curve of its own, so that none is left out for repeating another or for not changing.
    const rows = [1, 2, 3].map((step) => ({
      ...Object.fromEntries(names.map((name, i) => [name, Math.sin(step * (i + 1))])),
      step,
    }));
    const drawn = chartsOf({ ...run, rows }).flatMap(({ series }) => series.map(({ key }) => key));
    const missing = names.filter((name) => !drawn.includes(name) && !withoutChart.test(name));
    expect(missing).toEqual(names.includes('policy.loss') ? ofPolicies : []);
  });
});
