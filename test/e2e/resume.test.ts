/** A run that is killed, at any moment and in the middle of a save, and resumed ends with the bytes of the run never stopped. */
import { existsSync } from 'node:fs';
import { readdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { slow } from '../conditions.js';
import { digests } from '../digests.js';
import {
  configFile,
  lockstep,
  metricsOf,
  randomNumbers,
  smallModel,
  start,
  temporary,
  tokenRows,
  writeRows,
} from './train-process.js';

let folder: string;
let vocabulary: number;

beforeAll(async () => {
  folder = await temporary();
  vocabulary = JSON.parse(await readFile(join(smallModel, 'config.json'), 'utf8')).vocab_size;
  await writeRows(join(folder, 'text.jsonl'), tokenRows(60, vocabulary));
  await writeRows(
    join(folder, 'prompts.jsonl'),
    tokenRows(20, vocabulary, 2).map(({ tokens }) => ({ tokens: tokens.slice(0, 6) })),
  );
});

const sft = (output: string, changes = {}) => ({
  algorithm: 'sft',
  model: smallModel,
  data: { train: join(folder, 'text.jsonl') },
  dtype: 'bfloat16',
  batch: { sequences: 8, microTokens: 512 },
  optimizer: { learningRate: 1e-3, schedule: 'cosine', warmupSteps: 3 },
  steps: 24,
  seed: 1,
  checkpoint: { every: 2, keep: 2 },
  output: join(folder, output),
  ...changes,
});

const ppo = (output: string) => ({
  ...sft(output),
  algorithm: 'ppo',
  data: { train: join(folder, 'prompts.jsonl') },
  rollout: { samples: 2, maxNewTokens: 12 },
  ppo: { epochs: 2, miniBatches: 2, kl: { controller: 'adaptive' } },
  reward: { function: join(folder, 'reward.mjs') },
  checks: { mismatch: 'all' },
  steps: 10,
});

const seconds = (row: Record<string, number>) =>
  Object.fromEntries(Object.entries(row).filter(([name]) => !name.startsWith('seconds.')));

async function expectSameRun(whole: string, parted: string): Promise<void> {
  expect(await digests(join(parted, 'checkpoints'))).toEqual(await digests(join(whole, 'checkpoints')));
  expect((await metricsOf(parted)).map(seconds)).toEqual((await metricsOf(whole)).map(seconds));
  expect((await readdir(parted)).filter((name) => name.startsWith('.'))).toEqual([]);
}

/** Runs to the end, killed `kills` times after a random share of the time that the whole run took. */
async function killed(config: string, kills: number, wholeSeconds: number, seed: number): Promise<number> {
  const random = randomNumbers(seed);
  let done = 0;
  for (let attempt = 0; attempt < 40; attempt++) {
    const { child, ended } = start(['train', config, ...(attempt > 0 ? ['--resume'] : [])]);
    const delay = (0.1 + 0.5 * random()) * wholeSeconds * 1000;
    const timer = done < kills ? setTimeout(() => child.kill('SIGKILL'), delay) : undefined;
    const result = await ended;
    clearTimeout(timer);
    if (result.signal !== 'SIGKILL') {
      expect([result.code, result.stderr]).toEqual([0, expect.any(String)]);
      return done;
    }
    done++;
  }
  throw new Error('the run never ended');
}

/** Kills the process as soon as a folder of `inside` has a name that begins with `prefix`. */
async function killedAt(config: string, resume: boolean, inside: string, prefix: string): Promise<void> {
  const { child, ended } = start(['train', config, ...(resume ? ['--resume'] : [])]);
  const watch = setInterval(() => {
    if (!existsSync(inside)) return;
    readdir(inside).then(
      (names) => {
        if (names.some((name) => name.startsWith(prefix))) child.kill('SIGKILL');
      },
      () => undefined,
    );
  }, 1);
  await ended;
  clearInterval(watch);
}

/** Kills the process as soon as a save has begun; whether it had not ended. */
async function killedInSave(config: string, output: string, resume: boolean): Promise<boolean> {
  await killedAt(config, resume, output, '.saving-');
  return (await readdir(output)).some((name) => name.startsWith('.saving-'));
}

const fourRanks = { parallel: { pipeline: 2, tensor: 2 }, numerics: { parts: 2 } };
const layouts: { name: string; whole: string; changes: object }[] = [
  { name: 'one rank', whole: 'whole', changes: {} },
  { name: '4 ranks', whole: 'ranks', changes: fourRanks },
  {
    name: '4 ranks, two of them replicas',
    whole: 'replicas',
    changes: { parallel: { pipeline: 2, data: 2, zero: 1 }, steps: 12 },
  },
];

describe.each(layouts)('a killed run on $name', ({ whole, changes }) => {
  const named = (name: string) => `${whole}-${name}`;
  const configOf = (name: string) => configFile(folder, sft(name, changes), `${name}.json`);

  it('sft: resumed, ends with the same bytes and rows', async () => {
    const began = performance.now();
    const uninterrupted = await lockstep(['train', await configOf(whole)]);
    expect([uninterrupted.code, uninterrupted.stderr]).toEqual([0, expect.any(String)]);
    const elapsed = (performance.now() - began) / 1000;
    expect(await killed(await configOf(named('killed')), 4, elapsed, 5)).toBeGreaterThan(0);
    await expectSameRun(join(folder, whole), join(folder, named('killed')));
  });

  it('sft: killed in the middle of saves, ends with the same bytes', async () => {
    const output = join(folder, named('in-save'));
    const config = await configOf(named('in-save'));
    let caught = 0;
    for (let attempt = 0; attempt < 4; attempt++) caught += Number(await killedInSave(config, output, attempt > 0));
    expect(caught).toBeGreaterThan(0);
    const { code, stderr } = await lockstep(['train', config, '--resume']);
    expect([code, stderr]).toEqual([0, expect.any(String)]);
    await expectSameRun(join(folder, whole), output);
  });
});

describe('a killed run', () => {
  it('sft: of one rank, resumed on 4 that can give the same bits, ends with their bytes', async () => {
    const output = join(folder, 'moved');
    const before = await configFile(folder, sft('moved', { numerics: { parts: 2 } }), 'moved-from.json');
    await killedAt(before, false, join(output, 'checkpoints'), 'step-');
    expect((await readdir(join(output, 'checkpoints'))).length).toBeGreaterThan(0);
    expect(await readdir(join(output, 'checkpoints'))).not.toContain('step-000024');
    const after = await configFile(folder, sft('moved', fourRanks), 'moved-to.json');
    const { code, stderr } = await lockstep(['train', after, '--resume']);
    expect([code, stderr]).toEqual([0, expect.not.stringContaining('LAYOUT_DIFFERS')]);
    await expectSameRun(join(folder, 'ranks'), output);
  });

  slow('ppo: resumed, ends with the same bytes, policy and critic', async () => {
    await writeReward();
    const began = performance.now();
    const whole = await lockstep(['train', await configFile(folder, ppo('whole-ppo'), 'whole-ppo.json')]);
    expect([whole.code, whole.stderr]).toEqual([0, expect.any(String)]);
    const elapsed = (performance.now() - began) / 1000;
    const config = await configFile(folder, ppo('killed-ppo'), 'killed-ppo.json');
    expect(await killed(config, 4, elapsed, 9)).toBeGreaterThan(0);
    await expectSameRun(join(folder, 'whole-ppo'), join(folder, 'killed-ppo'));
  });
});

async function writeReward(): Promise<void> {
  await writeFile(
    join(folder, 'reward.mjs'),
    'export default (samples) => samples.map(({ tokens }) => tokens.filter((t) => t % 2 === 0).length / tokens.length);\n',
  );
}

describe.each([
  ['SIGINT', 130],
  ['SIGTERM', 143],
] as const)('%s', (signal, exitCode) => {
  it(`finishes the step, saves and exits ${exitCode}; resumed, the run is the one never stopped`, async () => {
    const output = join(folder, signal);
    const config = await configFile(folder, sft(signal), `${signal}.json`);
    const { child, ended, output: printed } = start(['train', config, '--json']);
    const watch = setInterval(() => {
      if (printed().split('\n').length <= 4) return;
      clearInterval(watch);
      child.kill(signal);
    }, 2);
    const { code, stderr } = await ended;
    expect([code, stderr]).toEqual([exitCode, expect.stringContaining('--resume')]);
    const rows = await metricsOf(output);
    const last = rows.at(-1)!.step!;
    expect(last).toBeLessThan(24);
    expect(await readdir(join(output, 'checkpoints'))).toContain(`step-${String(last).padStart(6, '0')}`);
    expect((await lockstep(['train', config, '--resume'])).code).toBe(0);
    const [whole, parted] = await Promise.all(
      ['whole', signal].map((name) => digests(join(folder, name, 'checkpoints'))),
    );
    expect(parted).toEqual(whole);
  });
});

it('a second interrupt stops in the middle of the step; resumed, the run is the one never stopped', async () => {
  await writeReward();
  const output = join(folder, 'twice');
  // Steps long enough that the second comes before the first has ended the run.
  const config = await configFile(
    folder,
    { ...ppo('twice'), steps: 4, checkpoint: { every: 1, keep: 9 } },
    'twice.json',
  );
  const { child, ended, output: printed } = start(['train', config, '--json']);
  const watch = setInterval(() => {
    if (printed().split('\n').length <= 2) return;
    clearInterval(watch);
    child.kill('SIGINT');
    child.stderr.on('data', (chunk) => {
      if (String(chunk).includes('finishing the step')) child.kill('SIGINT');
    });
  }, 2);
  const { code, stderr } = await ended;
  expect([code, stderr]).toEqual([130, expect.stringContaining('stopping in the middle of the step')]);
  expect(stderr).toMatch(/interrupted after step \d+; the newest checkpoint is .*; go on with --resume/);
  expect((await readdir(output)).filter((name) => name.startsWith('.'))).toEqual([]);
  expect((await lockstep(['train', config, '--resume'])).code).toBe(0);
  const whole = await configFile(folder, { ...ppo('once'), steps: 4, checkpoint: { every: 1, keep: 9 } }, 'once.json');
  expect((await lockstep(['train', whole])).code).toBe(0);
  await expectSameRun(join(folder, 'once'), output);
});
