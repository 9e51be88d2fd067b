/** No row is longer than a micro-batch, so that what a run plans for one is enough for each. */
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { TrainEvent } from '../../src/train/events.js';
import { train } from '../../src/train/train.js';
import { tableBackend, writeTableModel } from './train-fake-engine.js';

let folder: string;
let model: string;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'lockstep-limit-'));
  model = await writeTableModel();
  await writeFile(join(folder, 'reward.js'), 'export default (samples) => samples.map(() => 1);\n');
});
afterAll(() => rm(folder, { recursive: true }));

let files = 0;
async function run(algorithm: string, rows: readonly object[], changes: object = {}): Promise<TrainEvent[]> {
  const file = join(folder, `rows-${files++}.jsonl`);
  await writeFile(file, rows.map((row) => `${JSON.stringify(row)}\n`).join(''));
  const config = {
    ...{ algorithm, model, dtype: 'float32', steps: 1, output: `${file}.run` },
    ...{ data: { train: file, shuffle: false, onError: 'stop' }, batch: { sequences: rows.length, microTokens: 16 } },
  };
  const events: TrainEvent[] = [];
  const data = { ...config.data, ...(changes as { data?: object }).data };
  for await (const event of train({ ...config, ...changes, data } as never, { backend: tableBackend })) {
    events.push(event);
  }
  return events;
}

const tokens = (count: number): number[] => new Array<number>(count).fill(3);
const pair = (chosen: number, rejected: number) => ({
  ...{ prompt: [2], chosen: tokens(chosen - 1), rejected: tokens(rejected - 1) },
});
const answers = { reward: { function: '' }, rollout: { maxNewTokens: 6 }, ppo: { miniBatches: 1 } };

describe('a row that fills a micro-batch is learned from, and one with more is refused with file, line and limit', () => {
  it.each([
    ['sft', { tokens: tokens(16) }, { tokens: tokens(17) }, 'the row takes 18 tokens'],
    [
      'kto',
      { tokens: tokens(16), desirable: true },
      { tokens: tokens(17), desirable: true },
      'the row takes 18 tokens',
    ],
    ['reward', pair(8, 8), pair(8, 9), 'the row takes 18 tokens'],
    ['dpo', pair(5, 9), pair(11, 9), 'the row takes 22 tokens'],
    ['ppo', { tokens: tokens(10) }, { tokens: tokens(11) }, 'a prompt of 11 tokens and 6 new ones'],
  ])('%s', async (algorithm, full, more, message) => {
    const changes = algorithm === 'ppo' ? { ...answers, reward: { function: join(folder, 'reward.js') } } : {};
    expect((await run(algorithm, [full, full], changes)).at(-1)).toMatchObject({ type: 'done' });
    const failure = await run(algorithm, [full, more], changes).catch((error: Error) => error);
    expect(failure).toMatchObject({
      message: expect.stringMatching(/rows-\d+\.jsonl, line 2: .*batch.microTokens \(16\)/),
    });
    expect(failure).toMatchObject({ message: expect.stringContaining(message) });
  });
});

it('is left out and counted where bad rows are skipped', async () => {
  const rows = [{ tokens: tokens(4) }, { tokens: tokens(17) }, { tokens: tokens(4) }];
  const events = await run('sft', rows, { data: { onError: 'skip' } });
  expect(events).toContainEqual(expect.objectContaining({ type: 'warning', code: 'DATA_SKIPPED' }));
  expect(events.find(({ type }) => type === 'step')).toMatchObject({ metrics: { tokens: 8, 'data.skipped': 1 } });
});
