/** The examples do what examples/README.md says: each improves on held-out prompts by its margin, and is as short as it claims. */
import { existsSync, readdirSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { describe, expect, it } from 'vitest';
import { type Example, learn, prepare, statedExamples } from '../../bench/examples.js';
import { slow } from '../conditions.js';
import { temporary } from './train-process.js';

const examples = await statedExamples();

it('every configuration is in the table', () => {
  const folder = resolve('examples');
  const found = readdirSync(folder, { withFileTypes: true })
    .filter((entry) => entry.isDirectory() && entry.name !== 'quickstart')
    .flatMap(({ name }) => readdirSync(join(folder, name)).map((file) => `${name}/${file}`))
    .filter((name) => name.endsWith('.yaml'));
  expect([...examples.keys()].sort()).toEqual(found.sort());
});

describe('learn', () => {
  let prepared: Promise<string> | undefined;
  const folder = async (): Promise<string> => {
    const path = await temporary();
    await prepare(path, 0);
    return path;
  };
  for (const [config, rows] of examples) {
    slow(
      `${config} on held-out prompts`,
      async () => {
        prepared ??= folder();
        const found = await learn(
          await prepared,
          config,
          rows.map(({ measure }) => measure),
          0,
        );
        for (const row of rows) expect(found[row.measure]).toSatisfy(improvedBy(row), `${JSON.stringify(row)}`);
      },
      300_000,
    );
  }
});

const improvedBy =
  ({ margin }: Example) =>
  ({ before, after }: { before: number; after: number }): boolean =>
    (after - before) * Math.sign(margin) >= Math.abs(margin);

describe('an iteration is short', () => {
  /** The statements between `// One iteration` and the blank line after them. */
  const iteration = async (name: string): Promise<string[]> => {
    const path = `examples/${name}/${name}.ts`;
    expect(existsSync(path)).toBe(true);
    const lines = (await readFile(path, 'utf8')).split('\n');
    const begin = lines.findIndex((line) => line.trim().startsWith('// One iteration'));
    expect(begin).toBeGreaterThan(0);
    return lines.slice(begin + 1, lines.indexOf('', begin));
  };
  const calls = (lines: readonly string[], pattern: RegExp): number =>
    lines.filter((line) => pattern.test(line)).length;

  it('PPO: at most eight lines, with every call of the paper', async () => {
    const lines = await iteration('ppo');
    expect(lines.length).toBeLessThanOrEqual(8);
    for (const call of [
      'generateSequences',
      'computeValues',
      'computeLogprobs',
      'computeRewards',
      'critic.update',
      'actor.update',
    ]) {
      expect(calls(lines, new RegExp(call.replace('.', '\\.')))).toBe(1);
    }
  });

  it('Safe-RLHF: at most five lines more', async () => {
    const lines = await iteration('safe-rlhf');
    expect(lines.length).toBeLessThanOrEqual((await iteration('ppo')).length + 5);
    expect(calls(lines, /computeCosts/)).toBe(1);
  });

  it('ReMax: one generation more, no critic', async () => {
    const [remax, ppo] = [await iteration('remax'), await iteration('ppo')];
    expect(calls(remax, /generateSequences/)).toBe(calls(ppo, /generateSequences/) + 1);
    expect(calls(remax, /critic/i)).toBe(0);
  });
});
