/**
 * Safe RLHF: PPO with a constraint on the mean cost, by a Lagrange multiplier; a critic of rewards and one of costs.
 * Dai et al. 2023, arXiv:2310.12773, eq. 9 to 11 (PPO-Lagrangian; ptx as in InstructGPT).
 */
import { gae } from '../losses/advantages.js';
import { klPenalty } from '../losses/kl.js';
import { combineAdvantages, type LagrangeSettings, lagrangeMultiplier } from '../losses/lagrange.js';
import { policyLoss } from '../losses/policy.js';
import { whiten } from '../losses/statistics.js';
import { valueLoss } from '../losses/value.js';
import type { Rewards, Rollout, RolloutAlgorithm } from './algorithm.js';
import { actorMetrics, criticMetrics, klMetrics, mean, rolloutMetrics } from './metrics.js';
import { learnedMask, placeScores, pretrainingMix, sampledExperience, type TruncationSettings } from './rollout.js';

export interface SafeRlhfSettings extends TruncationSettings {
  readonly epochs: number;
  readonly miniBatches: number;
  /** ε of the clipped surrogate, ε_v of the clipped value losses. */
  readonly clip: number;
  readonly valueClip: number;
  readonly gamma: number;
  readonly lambda: number;
  /** β: subtracts from rewards and adds to costs. */
  readonly klCoefficient: number;
  /** Largest magnitude of a token's reward or cost, KL included; 0: none. */
  readonly rewardBound: number;
  readonly whiten: boolean;
  readonly entropyCoefficient: number;
  /** The constraint: mean cost per answer at most `threshold`. */
  readonly constraint: LagrangeSettings;
  readonly ptxCoefficient: number;
}

export function safeRlhf(settings: SafeRlhfSettings): RolloutAlgorithm {
  const { epochs, miniBatches, valueClip, clip, entropyCoefficient } = settings;
  const multiplier = lagrangeMultiplier(settings.constraint);
  return {
    models: ['actor', 'critic', 'costCritic', 'reference', 'reward', 'cost'],

    async iterate({ actor, critic, costCritic, reference, reward, cost }, prompts, context) {
      const sampled = actor.generateSequences(prompts, context);
      const values = [critic.computeValues(sampled), costCritic.computeValues(sampled)] as const;
      const given = [
        reference.computeLogprobs(sampled),
        reward.computeRewards(sampled),
        cost.computeCosts(sampled),
      ] as const;
      const [rollout, ofReward, ofCost, anchor, rewards, costs] = await Promise.all([sampled, ...values, ...given]);
      multiplier.update(costs.scores);
      const benefit = judge(rollout, anchor, rewards, ofReward, settings, 'reward');
      const harm = judge(rollout, anchor, costs, ofCost, settings, 'cost');
      const experience = policyExperience(rollout, benefit, harm, multiplier.multiplier, settings);
      const update = { epochs, miniBatches, iteration: context.iteration };
      const loss = valueLoss({ clip: valueClip });
      const [ofCritic, ofCostCritic, ofActor] = await Promise.all([
        critic.update(benefit.experience, loss, update),
        costCritic.update(harm.experience, loss, update),
        actor.update(experience, policyLoss({ clip, entropyCoefficient }), {
          ...update,
          also: pretrainingMix(context, settings.ptxCoefficient),
        }),
      ]);
      const metrics = {
        ...rolloutMetrics(rollout, rewards, settings),
        'cost.mean': mean(costs.scores),
        'cost.multiplier': multiplier.multiplier,
        ...klMetrics(benefit.penalty, settings.klCoefficient),
        ...criticMetrics(benefit.experience, ofCritic),
        'cost.value.loss': ofCostCritic.loss,
        ...actorMetrics(ofActor),
      };
      return { metrics, rollout, rewards };
    },

    state: () => multiplier.state(),
    restore: (state) => multiplier.restore(state),
  };
}

/** r_t = r − β d_t, c_t = c + β d_t (r and c at the last token);  A, R = GAE of each with its own critic. */
function judge(
  rollout: Rollout,
  referenceLogprobs: Float32Array,
  given: Rewards,
  values: Float32Array,
  { klCoefficient, rewardBound, ...settings }: SafeRlhfSettings,
  kind: 'reward' | 'cost',
) {
  const { lengths, logprobs } = rollout;
  const mask = learnedMask(rollout, settings);
  const penalised = kind === 'reward' ? settings : { ...settings, truncation: 'keep' as const };
  const penalty = klPenalty(
    { lengths, mask, scores: placeScores(rollout, given, penalised), logprobs, reference: referenceLogprobs },
    {
      coefficient: kind === 'reward' ? klCoefficient : -klCoefficient,
      estimator: 'k1',
      rewardBound: rewardBound > 0 ? rewardBound : undefined,
    },
  );
  const { advantages, returns } = gae({ lengths, mask, rewards: penalty.rewards, values }, settings);
  return { experience: sampledExperience(rollout, mask, { oldValues: values, returns }), advantages, penalty };
}

/** A = (A_r − λ A_c) / (1 + λ), whitened over the whole rollout. */
function policyExperience(
  rollout: Rollout,
  benefit: { advantages: Float64Array },
  harm: { advantages: Float64Array },
  multiplier: number,
  settings: SafeRlhfSettings,
) {
  const mask = learnedMask(rollout, settings);
  const combined = combineAdvantages(benefit.advantages, harm.advantages, multiplier);
  return sampledExperience(rollout, mask, { advantages: settings.whiten ? whiten(combined, mask) : combined });
}
