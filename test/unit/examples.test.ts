/** The programs of examples/ do what the library's own iterations do, over tables in place of models; excerpts are of what they name. */
import { readFile } from 'node:fs/promises';
import { expect, it, vi } from 'vitest';
import ppoProgram from '../../examples/ppo/ppo.js';
import remaxProgram from '../../examples/remax/remax.js';
import safeRlhfProgram from '../../examples/safe-rlhf/safe-rlhf.js';
import type { Models, RolloutAlgorithm } from '../../src/algorithms/algorithm.js';
import { type PpoSettings, ppo } from '../../src/algorithms/ppo.js';
import { type RemaxSettings, remax } from '../../src/algorithms/remax.js';
import { type SafeRlhfSettings, safeRlhf } from '../../src/algorithms/safe-rlhf.js';
import { countOf, Table, TableActor } from './table-models.js';

vi.mock('lockstep-rlhf/algorithms', () => import('../../src/algorithms/index.js'));
vi.mock('lockstep-rlhf/losses', () => import('../../src/losses/index.js'));

const truncation = { truncation: 'penalise', truncationPenalty: 2 } as const;
const rest = { epochs: 4, miniBatches: 1, valueClip: 0.2, gamma: 1, lambda: 0.95, klCoefficient: 0.1, whiten: true };
const ppoSettings: PpoSettings = {
  ...{ ...truncation, ...rest, clip: 0.1, entropyCoefficient: 0 },
  kl: { in: 'reward', estimator: 'k1', controller: 'fixed', target: 6, horizon: 100 },
};
const constraint = { initial: 1, learningRate: 0.5, threshold: 0.2, window: 64, maximum: 10 };
const safeSettings: SafeRlhfSettings = {
  ...{ ...truncation, ...rest, clip: 0.1, entropyCoefficient: 0, rewardBound: 0, constraint },
};
const remaxSettings: RemaxSettings = {
  ...{ ...truncation, epochs: 2, miniBatches: 1, samples: 2, gamma: 1, klCoefficient: 0.1, klReturn: 'token' },
};

/** Metrics of two iterations; of each group's answers, and of every greedy one, the first is cut. */
async function metricsOf(algorithm: RolloutAlgorithm) {
  const actor = new TableActor(2);
  const sample = actor.generateSequences.bind(actor);
  actor.generateSequences = async (asked) => {
    const rollout = await sample(asked);
    return { ...rollout, finish: rollout.finish.map((_, i) => (i % 2 ? 'stop' : 'length')) };
  };
  const [critic, costCritic, reference] = [new Table(1), new Table(1), new TableActor(0)];
  const cost = { computeCosts: countOf(1).computeRewards };
  const models = { actor, critic, costCritic, reference, reward: countOf(3), cost } as unknown as Models;
  const prompts = Array.from({ length: 64 }, () => ({ tokens: Int32Array.of(0), row: {} }));
  await algorithm.iterate(models, prompts, { iteration: 1 });
  const { metrics } = await algorithm.iterate(models, prompts, { iteration: 2 });
  return metrics;
}

const rollout = { ...truncation, samples: 2 };

it.each<Partial<PpoSettings>>([
  {},
  { clipHigh: 0.3 },
  { dualClip: 1.05 },
  { entropyCoefficient: 0.5 },
  { kl: { ...ppoSettings.kl, in: 'loss', estimator: 'k3' } },
])('PPO with %j', async (more) => {
  const settings = { ...ppoSettings, ...more };
  const program = ppoProgram({ ppo: settings, rollout } as unknown as Parameters<typeof ppoProgram>[0]);
  expect(await metricsOf(program)).toEqual(await metricsOf(ppo(settings)));
});

it.each<Partial<SafeRlhfSettings>>([{}, { clipHigh: 0.3 }, { dualClip: 1.05 }, { entropyCoefficient: 0.5 }])(
  'Safe-RLHF with %j',
  async (more) => {
    const settings = { ...safeSettings, ...more };
    const config = { 'safe-rlhf': settings, rollout } as unknown as Parameters<typeof safeRlhfProgram>[0];
    expect(await metricsOf(safeRlhfProgram(config))).toEqual(await metricsOf(safeRlhf(settings)));
  },
);

it('ReMax, whose greedy answers pay for being cut', async () => {
  const program = remaxProgram({ remax: remaxSettings, rollout } as unknown as Parameters<typeof remaxProgram>[0]);
  const { 'reward.greedy': greedy, ...metrics } = await metricsOf(remax(remaxSettings));
  expect(greedy).toBeDefined();
  expect(await metricsOf(program)).toEqual(metrics);
});

it.each([
  ['docs/programming-model.md', 'src/algorithms/ppo.ts'],
  ['README.md', 'examples/ppo/ppo.ts'],
])('%s shows the lines of %s', async (document, source) => {
  const text = await readFile(document, 'utf8');
  const begin = text.indexOf('```ts', text.indexOf('One iteration of PPO'));
  const [, ...shown] = text.slice(begin, text.indexOf('```\n', begin)).trimEnd().split('\n');
  const lines = (await readFile(source, 'utf8')).split('\n').map((line) => line.trim());
  const first = lines.indexOf(bare(shown[0]!));
  expect(shown.map(bare)).toEqual(lines.slice(first, first + shown.length));
});

const bare = (line: string): string => line.replace(/ *\/\/ .*/, '').trim();
