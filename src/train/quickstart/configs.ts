/** The three configurations of the quickstart: ordinary ones, as `lockstep train` takes them. */
import { join } from 'node:path';
import type { ConfigInput } from '../config.js';
import { dataFile } from './data.js';

export const stages = ['sft', 'reward', 'ppo'] as const;
export type Stage = (typeof stages)[number];

const steps = { sft: 100, reward: 200, ppo: 40 };

/** The model that a finished stage leaves behind. */
export function trainedModel(folder: string, stage: Stage): string {
  return join(folder, stage, 'checkpoints', `step-${String(steps[stage]).padStart(6, '0')}`);
}

/** @param folder the quickstart's folder, as given: paths in the configurations begin with it */
export function quickstartConfigs(folder: string, seed: number): Record<Stage, ConfigInput> {
  const data = join(folder, 'data');
  const common = (stage: Stage) => ({
    dtype: 'float32' as const,
    seed,
    steps: steps[stage],
    checkpoint: { every: 0, keep: 1 },
    output: join(folder, stage),
  });
  const schedule = { schedule: 'cosine' as const, warmupSteps: 10, weightDecay: 0.01 };
  return {
    sft: {
      algorithm: 'sft',
      model: join(folder, 'model'),
      data: { train: dataFile(data, 'sft', 'train'), eval: dataFile(data, 'sft', 'heldOut') },
      optimizer: { learningRate: 3e-3, ...schedule },
      batch: { sequences: 64, microTokens: 4096 },
      rollout: { maxNewTokens: 40 },
      evaluation: { every: 50, samples: 8 },
      ...common('sft'),
    },
    reward: {
      algorithm: 'reward',
      model: trainedModel(folder, 'sft'),
      data: { train: dataFile(data, 'pairs', 'train'), eval: dataFile(data, 'pairs', 'heldOut') },
      optimizer: { learningRate: 1e-3, ...schedule },
      batch: { sequences: 32, microTokens: 4096 },
      evaluation: { every: 50 },
      ...common('reward'),
    },
    ppo: {
      algorithm: 'ppo',
      model: trainedModel(folder, 'sft'),
      data: { train: dataFile(data, 'prompts', 'train'), eval: dataFile(data, 'prompts', 'heldOut') },
      reward: { model: trainedModel(folder, 'reward') },
      optimizer: { learningRate: 3e-4, schedule: 'linear', warmupSteps: 4, weightDecay: 0 },
      critic: { optimizer: { learningRate: 1e-3 } },
      batch: { sequences: 64, microTokens: 4096 },
      rollout: { maxNewTokens: 40 },
      ppo: { epochs: 1, miniBatches: 4, klCoefficient: 0.05 },
      checks: { mismatch: 'all' },
      evaluation: { every: 20, samples: 256 },
      ...common('ppo'),
    },
  };
}
