/** Training over several ranks through the command line: one rank's bytes over (p, t), and runs of 4 and 8 ranks. */
import { readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { digests } from '../digests.js';
import { configFile, lockstep, metricsOf, smallModel, temporary, tokenRows, writeRows } from './train-process.js';

let folder: string;

beforeAll(async () => {
  folder = await temporary();
  const vocabulary = JSON.parse(await readFile(join(smallModel, 'config.json'), 'utf8')).vocab_size;
  await writeRows(join(folder, 'text.jsonl'), tokenRows(40, vocabulary));
  const prompts = tokenRows(20, vocabulary, 2).map(({ tokens }) => ({ tokens: tokens.slice(0, 6) }));
  await writeRows(join(folder, 'prompts.jsonl'), prompts);
  await writeFile(
    join(folder, 'reward.mjs'),
    'export default (samples) => samples.map(({ tokens }) => tokens.filter((id) => id % 2 === 0).length);\n',
  );
});

const sft = {
  algorithm: 'sft',
  model: smallModel,
  dtype: 'bfloat16',
  batch: { sequences: 8, microTokens: 64 },
  optimizer: { learningRate: 1e-3 },
  numerics: { parts: 2 },
  steps: 3,
};

const ppo = {
  ...sft,
  algorithm: 'ppo',
  rollout: { samples: 2, maxNewTokens: 12 },
  ppo: { epochs: 2, miniBatches: 2 },
  checks: { mismatch: 'all' },
};

interface Layout {
  pipeline?: number;
  tensor?: number;
  data?: number;
  zero?: number;
  schedule?: string;
}

/** Output folders of runs, each of which is made once. */
const runs = new Map<string, Promise<string>>();

function train(kind: 'sft' | 'ppo', parallel: Layout, generation?: Layout): Promise<string> {
  const name = `${kind}${Object.entries(parallel)
    .map(([key, value]) => `-${key}-${value}`)
    .join('')}`;
  if (generation) return run(kind, { parallel, generation }, `${name}-generation`);
  const output = runs.get(name) ?? run(kind, { parallel }, name);
  runs.set(name, output);
  return output;
}

async function run(
  kind: 'sft' | 'ppo',
  layouts: { parallel: Layout; generation?: Layout },
  name: string,
): Promise<string> {
  const output = join(folder, name);
  const reward = { reward: { function: join(folder, 'reward.mjs') } };
  const own =
    kind === 'sft'
      ? { ...sft, data: { train: join(folder, 'text.jsonl') } }
      : { ...ppo, ...reward, data: { train: join(folder, 'prompts.jsonl') } };
  const path = await configFile(folder, { ...own, ...layouts, output }, `${name}.json`);
  const { code, stderr } = await lockstep(['train', path]);
  expect([name, code, stderr]).toEqual([name, 0, expect.any(String)]);
  return output;
}

const checkpointsOf = (output: string) => digests(join(output, 'checkpoints'));

describe.each(['sft', 'ppo'] as const)('%s', (kind) => {
  it('writes the checkpoints of one rank over pipeline and tensor ranks', async () => {
    const expected = await checkpointsOf(await train(kind, {}));
    for (const layout of [
      { tensor: 2, pipeline: 2 },
      { pipeline: 2, schedule: 'gpipe' },
    ]) {
      expect(await checkpointsOf(await train(kind, layout)), JSON.stringify(layout)).toEqual(expected);
    }
  });

  it('eight ranks: the same bytes again, whatever the ZeRO stage, and close to one rank', async () => {
    const layout = { tensor: 2, pipeline: 2, data: 2 };
    const output = await train(kind, layout);
    const expected = await checkpointsOf(output);
    expect(await checkpointsOf(await train(kind, { ...layout, zero: 1 }))).toEqual(expected);
    const one = await metricsOf(await train(kind, {}));
    for (const [i, row] of (await metricsOf(output)).entries()) {
      if (kind === 'ppo') expect(row).toMatchObject({ 'mismatch.max': 0, 'mismatch.tokens': expect.any(Number) });
      else expect(Math.abs(row.loss! / one[i]!.loss! - 1)).toBeLessThan(1e-4);
    }
  });

  it('draws the works of every rank in trace.json', async () => {
    const output = await train(kind, { tensor: 2, pipeline: 2, data: 2 });
    type Event = { name: string; cat?: string; ph: string; tid: number; args: { name?: string; step?: number } };
    const events = JSON.parse(await readFile(join(output, 'trace.json'), 'utf8')) as Event[];
    const named = events.filter(({ ph }) => ph === 'M').sort((a, b) => a.tid - b.tid);
    const rows = named.filter(({ args }) => args.name !== 'materialised');
    expect(named.length - rows.length).toBe(kind === 'ppo' ? 1 : 0);
    expect(rows.map(({ args }) => args.name)).toEqual(Array.from({ length: 8 }, (_, rank) => `rank ${rank}`));
    for (const { tid } of rows) {
      const own = events.filter((event) => event.tid === tid);
      const categories = own.map(({ cat }) => cat);
      expect(categories).toEqual(expect.arrayContaining(['compute', 'communication', 'idle']));
      for (const step of [1, 2, 3]) {
        const names = own.filter(({ args }) => args.step === step).map(({ name }) => name);
        expect(names).toEqual(expect.arrayContaining(['forward 0', 'backward 0', 'step']));
      }
    }
  });
});

it('sft over replicas: the same bytes at every ZeRO stage', async () => {
  const expected = await checkpointsOf(await train('sft', { tensor: 2, data: 2 }));
  for (const zero of [1, 2, 3]) {
    expect(await checkpointsOf(await train('sft', { tensor: 2, data: 2, zero })), `stage ${zero}`).toEqual(expected);
  }
});

it('ppo that generates in another layout than it trains in: the same bytes, and what the transition moved', async () => {
  const expected = await checkpointsOf(await train('ppo', {}));
  const output = await train('ppo', { tensor: 2, pipeline: 2 }, { pipeline: 1, tensor: 1 });
  expect(await checkpointsOf(output)).toEqual(expected);
  for (const row of await metricsOf(output)) {
    expect(row).toMatchObject({ 'mismatch.max': 0, 'bytes.transition': expect.any(Number) });
    expect(row['bytes.transition']).toBeGreaterThan(0);
    expect(row['seconds.transition']).toBeGreaterThan(0);
  }
});
