/** The gradient of every preference loss, of KTO and of the pretraining loss is its finite difference, away from kinks. */
import { describe, expect, it } from 'vitest';
import { kto } from '../../src/losses/kto.js';
import { evaluateLoss, type Loss, type LossBatch } from '../../src/losses/loss.js';
import { pretrainingLoss } from '../../src/losses/mixed.js';
import { preferenceLosses } from '../../src/losses/preference.js';
import { differences, expectSame } from './finite-differences.js';

const absent = Number.NaN;
const lengths = [3, 4, 2, 3];
const mask = [0, 1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 1];
const logprobs = [absent, -0.31, -1.27, absent, -0.74, absent, -2.13, -0.43, -1.9, absent, -0.2, -0.66];
const batch: LossBatch = {
  lengths,
  mask,
  columns: {
    referenceLogprobs: [absent, -0.9, -1.1, absent, -0.1, absent, -2.6, -0.8, -1.1, absent, -0.9, -0.5],
    desirable: [absent, 1, 1, absent, 0, absent, 0, 1, 1, absent, 0, 0],
    klBaseline: mask.map((learned) => (learned ? 0.23 : absent)),
  },
};

const settings = { beta: 0.7, labelSmoothing: 0.15, lengthNormalised: true, gamma: 0.4 };
const losses: Record<string, Loss> = {
  'ipo with sums': preferenceLosses.ipo({ beta: 0.7 }),
  'dpo without smoothing': preferenceLosses.dpo({ beta: 0.7 }),
  kto: kto({ beta: 0.7, desirableWeight: 1.3, undesirableWeight: 0.6 }),
  pretraining: pretrainingLoss(27.8),
};
for (const [name, loss] of Object.entries(preferenceLosses)) losses[name] = loss(settings);

describe('the gradient of a loss is its finite difference', () => {
  for (const [name, loss] of Object.entries(losses)) {
    it(name, () => {
      const { gradients } = evaluateLoss(loss, batch, { logprobs });
      const value = (x: number[]) => evaluateLoss(loss, batch, { logprobs: x }).loss;
      const difference = differences(value, logprobs, mask);
      // Every answer has a part in the loss.
      expect(difference.map((x) => (x === 0 ? 0 : 1))).toEqual(mask);
      expectSame(gradients.logprobs!, difference);
    });
  }
});
