import { describe, expect, test } from 'vitest';
import { chartsOf } from '../../src/reports/catalogue.js';
import { chartFigure } from '../../src/reports/chart.js';
import { healthHints } from '../../src/reports/health.js';
import { formatNumber, formatSeconds } from '../../src/reports/numbers.js';
import { phaseSeries } from '../../src/reports/phases.js';
import type { RunRecord } from '../../src/reports/run-record.js';
import { linearScale, logScale } from '../../src/reports/scale.js';
import { type Point, smooth, thin } from '../../src/reports/series.js';
import { summariseRun } from '../../src/reports/summary.js';
import { sparkline } from '../../src/reports/terminal.js';
import type { MetricsRow } from '../../src/train/events.js';

const points = (values: readonly number[]): Point[] => values.map((value, index) => ({ step: index + 1, value }));

function run(columns: Record<string, (step: number) => number>, steps = 50, algorithm = 'ppo'): RunRecord {
  const rows = Array.from(
    { length: steps },
    (_, index): MetricsRow => ({
      step: index + 1,
      ...Object.fromEntries(Object.entries(columns).map(([name, at]) => [name, at(index + 1)])),
    }),
  );
  return {
    folder: '/run',
    name: 'run',
    config: { algorithm },
    rows,
    unreadableLines: 0,
    evaluations: [],
    rollouts: [],
    checkpoints: [],
  };
}

describe('scales', () => {
  test.each([
    [0, 1],
    [-3, 17],
    [0.0012, 0.0019],
    [5, 5],
    [0, 0],
    [-1e-3, 1e5],
  ])('a linear axis over [%d, %d] has few round ticks inside its ends and keeps its ends', (low, high) => {
    const scale = linearScale([low, high], [200, 0]);
    expect(scale.ticks.length).toBeGreaterThanOrEqual(2);
    expect(scale.ticks.length).toBeLessThanOrEqual(12);
    expect(scale.minimum).toBeLessThanOrEqual(low);
    expect(scale.maximum).toBeGreaterThanOrEqual(high);
    expect(scale(scale.minimum)).toBe(200);
    expect(scale(scale.maximum)).toBe(0);
    for (const tick of scale.ticks) expect(String(Number(tick.toPrecision(4)))).toBe(String(tick));
  });

  test('a logarithmic axis puts equal ratios at equal distances', () => {
    const scale = logScale([0.002, 900], [100, 0]);
    expect(scale(1) - scale(10)).toBeCloseTo(scale(10) - scale(100), 10);
    expect(scale.ticks).toContain(10);
  });

  test('steps are whole', () => {
    for (const tick of linearScale([1, 4], [0, 100], { nice: false, whole: true }).ticks) {
      expect(Number.isInteger(tick)).toBe(true);
    }
  });
});

describe('series', () => {
  test('the moving average of a constant is the constant, from the first point on', () => {
    for (const { value } of smooth(points(Array(30).fill(2.5)), 10)) expect(value).toBeCloseTo(2.5, 12);
  });

  test('thinning keeps order, spikes and few points', () => {
    const many = points(Array.from({ length: 10_000 }, (_, index) => (index === 7_777 ? 100 : Math.sin(index))));
    const few = thin(many, 600);
    expect(few.length).toBeLessThanOrEqual(620);
    expect(few).toContainEqual({ step: 7_778, value: 100 });
    expect([...few].sort((a, b) => a.step - b.step)).toEqual(few);
  });

  test('a sparkline rises where the numbers do', () => {
    expect(sparkline(points([1, 2, 3, 4, 5, 6, 7, 8]), 8)).toBe('▁▂▃▄▅▆▇█');
    expect(sparkline(points([5, 5, 5]), 8)).toBe('▄▄▄');
    expect(sparkline(points(Array.from({ length: 100 }, (_, index) => -index)), 10)).toHaveLength(10);
  });
});

describe('charts', () => {
  test('a series that repeats another is not drawn twice, nor the loss that is the surrogate', () => {
    const sampled = run({
      'reward.mean': Math.sin,
      'reward.model': Math.sin,
      loss: Math.cos,
      'policy.loss': Math.cos,
    });
    expect(chartsOf(sampled).map(({ title, series }) => [title, series.map(({ key }) => key)])).toEqual([
      ['Reward', ['reward.mean']],
      ['Policy loss', ['policy.loss']],
    ]);
  });

  test('the terms of a reward and of a cost are drawn by the names that they have', () => {
    const paid = { 'reward.mean': Math.sin, 'reward.exact': Math.cos, 'reward.brevity': () => -1 };
    const costs = {
      'cost.mean': Math.sin,
      'cost.model': Math.cos,
      'cost.length': () => -1,
      'eval.cost.length': () => 0,
    };
    const charts = chartsOf(run({ ...paid, ...costs, 'cost.multiplier': Math.tan, 'cost.value.loss': Math.exp }));
    expect(charts.map(({ title, series }) => [title, series.map(({ label }) => label)])).toEqual([
      ['Reward', ['reward']],
      ['Reward terms', ['exact', 'brevity']],
      ['Cost', ['cost']],
      ['Cost multiplier', ['multiplier']],
      ['Cost terms', ['model', 'length', 'length, evaluation']],
      ['Value loss', ['of costs']],
    ]);
  });

  test('reward.model is the score before truncation, unless it is one of several terms', () => {
    const paid = run({ 'reward.mean': Math.sin, 'reward.model': Math.cos, 'reward.function': Math.tan });
    const labels = (reward: unknown) =>
      chartsOf({ ...paid, config: { algorithm: 'ppo', reward } }).map(({ series }) => series.map(({ label }) => label));
    expect(labels([{ name: 'model' }, { name: 'function' }])).toEqual([['reward'], ['model', 'function']]);
    expect(labels([{ name: 'scorer' }, { name: 'function' }])).toEqual([
      ['reward', 'before rollout.truncation'],
      ['function'],
    ]);
  });

  test('a clip that changes nothing and a policy that stays the same are not shown', () => {
    const shown = (at: (step: number) => number) => {
      const record = run({ 'reward.mean': Math.sin, 'policy.kl': at, 'policy.clipFraction': at });
      return [...chartsOf(record).map(({ title }) => title), ...summariseRun(record).headline];
    };
    expect(shown(() => 0)).toEqual(['Reward', 'reward.mean']);
    expect(shown((step) => step / 100)).toEqual([
      ...['Reward', 'KL within an update', 'Clip fraction'],
      ...['reward.mean', 'policy.clipFraction'],
    ]);
  });

  test('what a controller does not steer is not drawn', () => {
    const titles = (beta: (step: number) => number) =>
      chartsOf(run({ 'kl.coefficient': beta })).map(({ title }) => title);
    expect(titles(() => 0.05)).toEqual([]);
    expect(titles((step) => 0.05 / step)).toEqual(['KL coefficient']);
  });

  test('a student is compared with its teacher, every other policy with its reference', () => {
    const student = run({ 'kl.mean': Math.sin });
    expect(chartsOf(student)[0]!.title).toBe('KL to the reference');
    const taught = { ...student, config: { algorithm: 'distillation', teacher: { model: 't' } } };
    expect(chartsOf(taught)[0]!.title).toBe('KL to the teacher');
  });
});

describe('phases', () => {
  test('add up to the step: what they leave is a phase of its own, and native calls are not counted twice', () => {
    const { rows } = run({
      'seconds.generation': () => 1,
      'seconds.policyUpdate': () => 2,
      'seconds.step': () => 3.5,
      'seconds.native': () => 2.9,
    });
    const phases = phaseSeries(rows);
    expect(phases.map(({ label }) => label)).toEqual(['policyUpdate', 'generation', 'rest']);
    expect(phases.reduce((total, { points: all }) => total + all[0]!.value, 0)).toBeCloseTo(3.5, 12);
  });

  test('of a run whose models are called without phases are the native calls and the rest', () => {
    const { rows } = run({ 'seconds.data': () => 0.01, 'seconds.step': () => 1, 'seconds.native': () => 0.9 });
    expect(phaseSeries(rows).map(({ label }) => label)).toEqual(['model', 'rest', 'data']);
  });

  test('beyond seven are drawn as one, and nothing is lost', () => {
    const names = [...'abcdefghij'];
    const timed = run(Object.fromEntries(names.map((name, index) => [`seconds.${name}`, () => 10 - index])), 3);
    const { series } = chartsOf(timed).at(-1)!;
    expect(series).toHaveLength(7);
    expect(series.reduce((sum, { points: all }) => sum + all[0]!.value, 0)).toBe(55);
  });

  test('are stacked: the top edge is the sum', () => {
    const [chart] = chartsOf(run({ 'seconds.a': () => 1, 'seconds.b': () => 2 }, 5));
    const data = /<script type="application\/json">(.*)<\/script>/.exec(chartFigure(chart!, 'c'))![1]!;
    const { series, plot } = JSON.parse(data) as { plot: number[]; series: { points: number[][] }[] };
    const bottom = plot[3]!;
    const height = (index: number) => bottom - series[index]!.points[0]![2]!;
    expect(height(1) / height(0)).toBeCloseTo(1.5, 1);
    expect(series[1]!.points[0]![3]).toBe(1);
  });
});

describe('health hints', () => {
  type Columns = Record<string, (step: number) => number>;
  const texts = (columns: Columns, config: Record<string, unknown> = { algorithm: 'ppo' }) =>
    healthHints({ ...run(columns), config });

  test.each<[string, Columns, string]>([
    ['a mismatch', { 'mismatch.max': (step) => (step === 30 ? 1e-6 : 0) }, 'disagree by up to 1e-6'],
    ['a reward that falls back', { 'reward.mean': (step) => (step < 30 ? step / 10 : 0.4) }, 'fell back'],
    ['a reward that stays', { 'reward.mean': () => 1 }, 'did not rise'],
    ['a large KL', { 'kl.mean': (step) => step }, 'KL reached'],
    ['a negative KL', { 'kl.mean': () => -0.3 }, 'below zero'],
    ['much clipping', { 'policy.clipFraction': () => 0.5 }, '50 % of tokens are clipped'],
    ['a bad critic', { 'value.explained': () => -0.5 }, 'the critic explains -0.5'],
    ['truncation', { 'response.truncated': () => 0.6 }, 'rollout.maxNewTokens'],
    ['growing answers', { 'response.length': (step) => 10 * step }, 'pay for length'],
    ['collapsed entropy', { entropy: (step) => 2 / step ** 2 }, 'little is left to explore'],
    ['a spike', { 'gradient.norm': (step) => (step === 25 ? 500 : 1) }, 'spiked to 500'],
  ])('%s is pointed out', (_, columns, words) => {
    const [first] = texts(columns);
    expect(first?.text).toContain(words);
    expect(first?.level).not.toBe('good');
  });

  test('overfitting is pointed out', () => {
    const hints = texts({ loss: (step) => 1 / step, 'eval.loss': (step) => 1 + Math.abs(step - 20) / 50 });
    expect(hints.map(({ text }) => text).join()).toContain('overfit');
  });

  test('the loss of a policy that samples is no sign of anything', () => {
    expect(texts({ loss: (step) => step, 'policy.loss': (step) => step })).toEqual([]);
    expect(texts({ loss: (step) => step })[0]).toMatchObject({ level: 'warning' });
  });

  const grpo = {
    ...{ algorithm: 'grpo', grpo: { klCoefficient: 0, epochs: 2, samplingRounds: 3 } },
    ...{ batch: { sequences: 32 }, rollout: { samples: 4 } },
  };

  test.each<[string, Columns, string, string]>([
    [
      'a reward that falls back',
      { 'reward.mean': (step) => (step < 30 ? step / 10 : 0.4) },
      'warning',
      'grpo.klCoefficient',
    ],
    ['much clipping', { 'policy.clipFraction': () => 0.5 }, 'warning', 'lower the learning rate or lower grpo.epochs'],
    ['groups without a difference', { 'groups.equal': () => 6 }, 'notice', '75 % of the prompts'],
    ['sampling at its limit', { 'groups.rounds': () => 3 }, 'notice', 'all 3 rounds of grpo.samplingRounds'],
    ['empty responses', { 'response.empty': () => 0.5 }, 'warning', '50 % of responses are empty'],
  ])('%s: the setting of the run’s own algorithm is named', (_, columns, level, words) => {
    expect(texts(columns, grpo)).toEqual([{ level, text: expect.stringContaining(words) }]);
  });

  test('a setting that the algorithm lacks is not named', () => {
    const [hint] = texts({ 'policy.clipFraction': () => 0.5 }, { algorithm: 'of-my-own' });
    expect(hint?.text).toMatch(/lower the learning rate$/);
  });

  test.each<[string, Columns, [string, string][]]>([
    [
      'accuracy and margin',
      { loss: () => 0.5, 'reward.accuracy': (step) => 0.5 + step / 100, 'reward.margin': (step) => step },
      [
        ['good', 'the accuracy rose: 53 % to 98 %'],
        ['good', 'the margin rose: 3 to 48'],
      ],
    ],
    [
      'margins, where answers are judged alone',
      { 'reward.margin': (step) => -step },
      [['warning', 'did not rise: -3 to -48']],
    ],
    [
      'held-out rows before those learned from',
      { 'reward.accuracy': () => 1, 'eval.reward.accuracy': () => 0.4 },
      [['warning', 'held-out accuracy is 40 %: no better than chance']],
    ],
    [
      'chosen answers that become less likely',
      { 'reward.margin': (step) => step, 'reward.chosen': (step) => -2 * step },
      [
        ['notice', 'fell from -6 to -96, by more than the margin grew'],
        ['good', 'the margin rose'],
      ],
    ],
  ])('preferences are told by %s', (_, columns, expected) => {
    expect(texts(columns, { algorithm: 'dpo' })).toEqual(
      expected.map(([level, words]) => ({ level, text: expect.stringContaining(words) })),
    );
  });

  test('a constraint is told by its threshold, and comes before the reward', () => {
    const config = { algorithm: 'safe-rlhf', 'safe-rlhf': { constraint: { threshold: 0.5 } } };
    const columns = { 'reward.mean': (step: number) => -step, 'cost.mean': (step: number) => 4 / step };
    expect(texts(columns, config)).toEqual([
      { level: 'notice', text: expect.stringContaining('reward did not rise') },
      { level: 'good', text: expect.stringContaining('within its threshold of 0.5') },
    ]);
    const [first] = texts({ 'cost.mean': (step) => step }, config);
    expect(first).toEqual({ level: 'warning', text: 'the cost did not fall: 3 to 48; its threshold is 0.5' });
  });

  test('a student comes close to its teacher; a policy keeps near its reference', () => {
    const columns = { 'kl.mean': (step: number) => 10 - step / 10 };
    expect(texts(columns, { algorithm: 'distillation', teacher: { model: 't' } })).toEqual([
      { level: 'good', text: 'the KL to the teacher fell: 9.7 to 5.2 a token' },
    ]);
    expect(texts(columns)).toEqual([{ level: 'warning', text: expect.stringContaining('far from its reference') }]);
  });

  test('a healthy run is told so, and no more', () => {
    const hints = texts({
      'mismatch.max': () => 0,
      'reward.mean': (step) => step / 50,
      'kl.mean': (step) => step / 50,
      'policy.clipFraction': () => 0.05,
      'value.explained': (step) => step / 60,
      'response.length': () => 20,
      entropy: () => 2,
      'gradient.norm': () => 1,
    });
    expect(hints.map(({ level }) => level)).toEqual(['good', 'good']);
  });
});

describe('numbers', () => {
  test.each([
    [0, '0'],
    [1234.5678, '1235'],
    [0.00012, '0.00012'],
    [0.0000123456, '1.23e-5'],
    [12_345_678, '1.23e7'],
    [-0.5, '-0.5'],
    [100, '100'],
  ])('%d reads %s', (value, written) => {
    expect(formatNumber(value)).toBe(written);
  });

  test.each([
    [0.034, '0.034 s'],
    [59.4, '59 s'],
    [60, '1 min'],
    [199.7, '3 min 20 s'],
    [3600, '1 h'],
    [7530, '2 h 6 min'],
    [200_000, '2 d 8 h'],
  ])('%d seconds read %s', (seconds, written) => {
    expect(formatSeconds(seconds)).toBe(written);
  });
});
