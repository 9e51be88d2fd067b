/** The quickstart as a user runs it: it improves what it says it improves, and the same seed gives the same bytes. */
import { readFile, stat } from 'node:fs/promises';
import { join } from 'node:path';
import { expect } from 'vitest';
import { reward as points } from '../../examples/quickstart/check.js';
import type { Sample } from '../../src/train/events.js';
import { slow } from '../conditions.js';
import { digests } from '../digests.js';
import { lockstep, metricsOf, temporary } from './train-process.js';

const keys = ['before', 'after', 'standardDeviation', 'checkBefore', 'checkAfter', 'checkStandardDeviation'];

async function samplesOf(output: string, step: string): Promise<Required<Sample>[]> {
  const text = await readFile(join(output, 'ppo', 'rollouts', `eval-${step}.jsonl`), 'utf8');
  return text
    .trimEnd()
    .split('\n')
    .map((line) => JSON.parse(line));
}

function statistics(x: readonly number[]): { mean: number; deviation: number } {
  const mean = x.reduce((sum, value) => sum + value, 0) / x.length;
  return { mean, deviation: Math.sqrt(x.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (x.length - 1)) };
}

slow(
  'the quickstart improves score and check by a standard deviation, and repeats itself',
  async () => {
    const output = join(await temporary(), 'quickstart');
    const first = await lockstep(['quickstart', '--output', output, '--json']);
    expect([first.code, first.stderr]).toEqual([0, expect.any(String)]);
    const summary = JSON.parse(await readFile(join(output, 'summary.json'), 'utf8'));
    expect(JSON.parse(first.stdout)).toEqual(summary);
    expect(Object.keys(summary).sort()).toEqual([...keys, 'mismatchMax', 'mismatchTokens'].sort());
    for (const value of Object.values(summary)) expect(Number.isFinite(value)).toBe(true);
    expect(summary.after - summary.before).toBeGreaterThanOrEqual(summary.standardDeviation);
    expect(summary.checkAfter - summary.checkBefore).toBeGreaterThanOrEqual(summary.checkStandardDeviation);

    // The same numbers from the texts that the run kept.
    const [before, after] = [await samplesOf(output, '000000'), await samplesOf(output, '000040')];
    expect(before.map(({ prompt }) => prompt)).toEqual(after.map(({ prompt }) => prompt));
    const scores = statistics(before.map(({ reward }) => reward));
    const checks = statistics(points(before).map((count) => count / 6));
    expect(summary.before).toBeCloseTo(scores.mean, 9);
    expect(summary.standardDeviation).toBeCloseTo(scores.deviation, 9);
    expect(summary.after).toBeCloseTo(statistics(after.map(({ reward }) => reward)).mean, 9);
    expect(summary.checkBefore).toBeCloseTo(checks.mean, 9);
    expect(summary.checkStandardDeviation).toBeCloseTo(checks.deviation, 9);
    expect(summary.checkAfter).toBeCloseTo(statistics(points(after).map((count) => count / 6)).mean, 9);

    // Every sampled token of every step was compared.
    const steps = (await metricsOf(join(output, 'ppo'))).filter(({ step }) => step! > 0);
    const sampled = steps.reduce((sum, row) => sum + row['response.length']! * 64, 0);
    expect([summary.mismatchMax, summary.mismatchTokens]).toEqual([0, Math.round(sampled)]);

    const reports = ['sft', 'reward', 'ppo'].map((stage) => join(output, stage, 'report.html'));
    for (const report of reports) expect((await stat(report)).size).toBeGreaterThan(10_000);
    expect(first.stderr).toContain(join('ppo', 'report.html'));

    const bytes = await digests(join(output, 'ppo', 'checkpoints'));
    const second = await lockstep(['quickstart', '--output', output, '--json', '--quiet']);
    expect([second.code, second.stderr]).toEqual([0, '']);
    expect(JSON.parse(second.stdout)).toEqual(summary);
    expect(await digests(join(output, 'ppo', 'checkpoints'))).toEqual(bytes);
  },
  600_000,
);
