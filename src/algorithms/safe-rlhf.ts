/**
 * Safe RLHF: PPO with a constraint on the mean cost, by a Lagrange multiplier; a critic of rewards and one of costs.
 * Dai et al. 2023, arXiv:2310.12773, eq. 9 to 11 (PPO-Lagrangian; ptx as in InstructGPT).
 */
import { gae } from '../losses/advantages.js';
import { combineAdvantages, type LagrangeSettings, lagrangeMultiplier, safetyPenalty } from '../losses/lagrange.js';
import { policyLoss } from '../losses/policy.js';
import { whiten } from '../losses/statistics.js';
import { valueLoss } from '../losses/value.js';
import type { Rewards, Rollout, RolloutAlgorithm } from './algorithm.js';
import { actorMetrics, costMetrics, criticMetrics, klMetrics, rolloutMetrics } from './metrics.js';
import type { ActorCriticSettings } from './ppo.js';
import { anchorOf, referenceOf } from './reference.js';
import { learnedMask, placeScores, pretrainingMix, sampledExperience } from './rollout.js';

/** PPO's, with β subtracting from rewards and adding to costs. */
export interface SafeRlhfSettings extends ActorCriticSettings {
  /** Largest magnitude of a token's reward or cost, KL included; 0: none. */
  readonly rewardBound: number;
  /** The constraint: mean cost per answer at most `threshold`. */
  readonly constraint: LagrangeSettings;
}

/** One iteration: a rollout, its rewards and costs, a step of λ, updates of both critics and the policy. */
export function safeRlhf(
  settings: SafeRlhfSettings,
): RolloutAlgorithm<'actor' | 'critic' | 'costCritic' | 'reference' | 'reward' | 'cost'> {
  const { epochs, miniBatches, klCoefficient, ptxCoefficient = 0 } = settings;
  const [ofPolicy, ofValues] = [policyLoss(settings), valueLoss({ clip: settings.valueClip })];
  const multiplier = lagrangeMultiplier(settings.constraint);
  return {
    models: ['actor', 'critic', 'costCritic', ...referenceOf(klCoefficient), 'reward', 'cost'],

    async iterate({ actor, critic, costCritic, reference, reward, cost }, prompts, context) {
      const sampled = actor.generateSequences(prompts, { iteration: context.iteration });
      const ready = await Promise.all([
        sampled,
        critic.computeValues(sampled),
        costCritic.computeValues(sampled),
        anchorOf(reference, sampled, klCoefficient),
        reward.computeRewards(sampled),
        cost.computeCosts(sampled),
      ]);
      const [rollout, , , , rewards, costs] = ready;
      multiplier.update(costs.scores);
      const { experience, penalty } = makeExperience(...ready, settings, multiplier.multiplier);
      const update = { epochs, miniBatches, iteration: context.iteration };
      const [ofCritic, ofCostCritic, ofActor] = await Promise.all([
        critic.update(experience.ofRewards, ofValues, update),
        costCritic.update(experience.ofCosts, ofValues, update),
        actor.update(experience.ofPolicy, ofPolicy, { ...update, also: pretrainingMix(context, ptxCoefficient) }),
      ]);
      const metrics = {
        ...rolloutMetrics(rollout, rewards, settings),
        ...costMetrics(costs),
        'cost.multiplier': multiplier.multiplier,
        ...(klCoefficient > 0 ? klMetrics(penalty, klCoefficient) : {}),
        ...criticMetrics(experience.ofRewards, ofCritic),
        'cost.value.loss': ofCostCritic.loss,
        ...actorMetrics(ofActor),
      };
      return { metrics, rollout, rewards };
    },

    state: () => multiplier.state(),
    restore: (state) => multiplier.restore(state),
  };
}

/**
 * r_t = r − β d_t, c_t = c + β d_t (r and c at the last token);  A, R = GAE of each with its own critic;
 * A = (A_r − λ A_c) / (1 + λ), whitened over the whole rollout.
 */
export function makeExperience(
  rollout: Rollout,
  values: Float32Array,
  costValues: Float32Array,
  anchor: Float32Array,
  rewards: Rewards,
  costs: Rewards,
  { klCoefficient, rewardBound, ...settings }: SafeRlhfSettings,
  multiplier: number,
) {
  const { tokens, lengths, logprobs } = rollout;
  const mask = learnedMask(rollout, settings);
  const rewardScores = placeScores(rollout, rewards, settings);
  const costScores = placeScores(rollout, costs, { ...settings, truncation: 'keep' });
  const shaped = safetyPenalty(
    { lengths, mask, rewardScores, costScores, logprobs, reference: anchor },
    { coefficient: klCoefficient, estimator: 'k1', rewardBound: rewardBound > 0 ? rewardBound : undefined },
  );
  const benefit = gae({ lengths, mask, rewards: shaped.rewards.rewards, values }, settings);
  const harm = gae({ lengths, mask, rewards: shaped.costs, values: costValues }, settings);
  const combined = combineAdvantages(benefit.advantages, harm.advantages, multiplier);
  const advantages = settings.whiten ? whiten(combined, mask) : combined;
  const experience = {
    ofPolicy: sampledExperience(rollout, mask, { advantages }),
    ofRewards: { tokens, lengths, mask, columns: { oldValues: values, returns: benefit.returns } },
    ofCosts: { tokens, lengths, mask, columns: { oldValues: costValues, returns: harm.returns } },
  };
  return { experience, penalty: shaped.rewards };
}
