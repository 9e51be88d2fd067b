/**
 * PPO-Lagrangian: rewards are maximised while the mean cost stays below a threshold.
 * Dai et al. 2023, Safe RLHF, arXiv:2310.12773, section 3.3 and appendix B.
 */
import { LockstepError } from '../errors.js';
import { type KlPenalty, type KlPenaltyInputs, type KlPenaltySettings, klPenalty } from './kl.js';
import type { Numbers } from './selection.js';
import { moments } from './statistics.js';

export interface LagrangeSettings {
  /** λ before the first step; greater than 0. */
  readonly initial: number;
  /** Of the gradient step on log λ. */
  readonly learningRate: number;
  /** d: the mean cost to stay below. */
  readonly threshold: number;
  /** Episodes that the mean cost J is over: the latest so many, at least 1. */
  readonly window: number;
  /** Updates that only collect costs before λ moves; 0 by default. */
  readonly delay?: number | undefined;
  /** The largest λ; none by default. */
  readonly maximum?: number | undefined;
}

/** What a checkpoint keeps of a multiplier. */
export type LagrangeState = {
  /** log λ, which the steps are taken on. */
  readonly logMultiplier: number;
  /** The latest episode costs, oldest first. */
  readonly costs: readonly number[];
  /** Updates so far. */
  readonly updates: number;
};

export interface LagrangeMultiplier {
  /** λ for the next policy update. */
  readonly multiplier: number;
  /** J: the mean of the costs in the window; 0 before the first. */
  readonly meanCost: number;
  /** Learns the episode costs of a rollout. A NaN among them makes λ NaN. */
  update(episodeCosts: Numbers): void;
  state(): LagrangeState;
  /** Continues from a saved state. Throws `CHECKPOINT_CONTROLLER` when it is not one of finite numbers. */
  restore(state: Readonly<Record<string, unknown>>): void;
}

/** The multiplier's loss (J − d) λ is clamped to ± this in Safe-RLHF's code: beyond, it has no gradient. */
const lossBound = 1e6;

/** log λ ← min(log λ + lr (J − d) λ, log maximum); no step before `delay` updates, nor where |(J − d) λ| > 1e6. */
export function lagrangeMultiplier(settings: LagrangeSettings): LagrangeMultiplier {
  const { initial, learningRate, threshold, window, delay = 0, maximum = Infinity } = settings;
  let logMultiplier = Math.log(initial);
  let costs: number[] = [];
  let updates = 0;
  return {
    get multiplier() {
      return Math.exp(logMultiplier);
    },
    get meanCost() {
      return moments(costs).mean;
    },
    update(episodeCosts) {
      costs = [...costs, ...Array.from(episodeCosts)].slice(-window);
      if (updates++ < delay || costs.length === 0) return;
      const gradient = (moments(costs).mean - threshold) * Math.exp(logMultiplier);
      if (Math.abs(gradient) > lossBound) return;
      logMultiplier = Math.min(logMultiplier + learningRate * gradient, Math.log(maximum));
    },
    state: () => ({ logMultiplier, costs: [...costs], updates }),
    restore(saved) {
      const state = checkedState(saved);
      logMultiplier = state.logMultiplier;
      costs = state.costs.slice(-window);
      updates = state.updates;
    },
  };
}

function checkedState(state: Readonly<Record<string, unknown>>): LagrangeState {
  const { logMultiplier, costs, updates } = state;
  const finite = Array.isArray(costs) && [logMultiplier, updates, ...costs].every(Number.isFinite);
  if (finite) return state as LagrangeState;
  throw new LockstepError(
    'CHECKPOINT_CONTROLLER',
    `The saved Lagrange multiplier has log λ ${logMultiplier} after ${updates} updates; these and a list of episode costs ` +
      'are needed, all of them finite numbers. Use an older checkpoint.',
    { logMultiplier, costs, updates },
  );
}

/** A = (A_r − λ A_c) / (1 + λ), packed; 0 where the mask is 0. Without a mask every entry is combined. */
export const combineAdvantages = (
  rewardAdvantages: Numbers,
  costAdvantages: Numbers,
  lambda: number,
  mask?: Numbers,
): Float64Array =>
  Float64Array.from(rewardAdvantages, (advantage, t) =>
    mask && !mask[t] ? 0 : (advantage - lambda * costAdvantages[t]!) / (1 + lambda),
  );

/** Per-token scores of the reward model and of the cost model, each answer's at its last token. */
export interface SafetyPenaltyInputs extends Omit<KlPenaltyInputs, 'scores'> {
  readonly rewardScores: Numbers;
  readonly costScores: Numbers;
}

/** Packed, 0 where the mask is 0. */
export interface SafetyPenalty {
  /** `rewards.rewards` are the shaped rewards. */
  readonly rewards: KlPenalty;
  readonly costs: Float64Array;
}

/**
 * r_t = reward_t − β kl_t and c_t = cost_t + β kl_t: moving away from the reference loses reward and adds cost. Bounds of
 * the settings hold for either (Safe-RLHF's code: `rewardBound`).
 */
export function safetyPenalty(batch: SafetyPenaltyInputs, settings: KlPenaltySettings): SafetyPenalty {
  const negated = { ...settings, coefficient: -settings.coefficient };
  return {
    rewards: klPenalty({ ...batch, scores: batch.rewardScores }, settings),
    costs: klPenalty({ ...batch, scores: batch.costScores }, negated).rewards,
  };
}
