/**
 * Proximal policy optimisation for language models.
 * Schulman et al. 2017, arXiv:1707.06347 (clipped surrogate); Schulman et al. 2015, arXiv:1506.02438 (GAE); Ziegler et al.
 * 2019, arXiv:1909.08593 and Ouyang et al. 2022, arXiv:2203.02155 (KL in the reward).
 */
import { gae } from '../losses/advantages.js';
import { adaptiveKl, fixedKl } from '../losses/controllers.js';
import { type KlEstimator, type KlPenalty, klPenalty } from '../losses/kl.js';
import { policyLoss } from '../losses/policy.js';
import { whiten } from '../losses/statistics.js';
import { valueLoss } from '../losses/value.js';
import type { Experience, Rewards, Rollout, RolloutAlgorithm, UpdateStatistics } from './algorithm.js';
import { actorMetrics, criticMetrics, klMetrics, rolloutMetrics } from './metrics.js';
import { anchorOf, referenceOf } from './reference.js';
import { learnedMask, placeScores, pretrainingMix, sampledExperience, type TruncationSettings } from './rollout.js';

/** What a policy with a critic has: PPO's, and Safe-RLHF's too. */
export interface ActorCriticSettings extends TruncationSettings {
  /** Times a rollout is used, and optimizer steps each time. */
  readonly epochs: number;
  readonly miniBatches: number;
  /** ε of the clipped surrogate (eq. 7), or ε_low and ε_high; c of the dual clip; ε_v of the clipped value loss. */
  readonly clip: number;
  readonly clipHigh?: number | undefined;
  readonly dualClip?: number | undefined;
  readonly valueClip: number;
  /** γ and λ of generalised advantage estimation. */
  readonly gamma: number;
  readonly lambda: number;
  /** β: weight of the KL term, at the start when a controller is adaptive; 0: no term, and no reference model. */
  readonly klCoefficient: number;
  /** Advantages to mean 0 and variance 1 over the whole rollout. */
  readonly whiten: boolean;
  /** Weight of the entropy bonus. */
  readonly entropyCoefficient: number;
  /** γ of the pretraining mix, when a run has one. */
  readonly ptxCoefficient?: number | undefined;
}

export interface PpoSettings extends ActorCriticSettings {
  readonly kl: {
    /** As a penalty in the reward, or as a term of the policy loss. */
    readonly in: 'reward' | 'loss';
    readonly estimator: KlEstimator;
    readonly controller: 'fixed' | 'adaptive';
    /** Nats per answer to steer to, and answers over which an error of 1 would double β. */
    readonly target: number;
    readonly horizon: number;
  };
}

/** One iteration: a rollout, what critic, reference and reward say of it, updates of critic and policy. */
export function ppo(settings: PpoSettings): RolloutAlgorithm<'actor' | 'critic' | 'reference' | 'reward'> {
  const { epochs, miniBatches, klCoefficient, kl } = settings;
  const beta =
    kl.controller === 'adaptive' ? adaptiveKl({ coefficient: klCoefficient, ...kl }) : fixedKl(klCoefficient);
  const report = (
    { experience, penalty }: ReturnType<typeof makeExperience>,
    [rollout, rewards, ofCritic, ofActor]: readonly [Rollout, Rewards, UpdateStatistics, UpdateStatistics],
  ) => {
    const ofKl = klCoefficient > 0 ? klMetrics(penalty, beta.coefficient) : {};
    const ofRollout = { ...rolloutMetrics(rollout, rewards, settings), ...ofKl };
    const metrics = { ...ofRollout, ...criticMetrics(experience, ofCritic), ...actorMetrics(ofActor) };
    beta.update(penalty.perSequence, rollout.lengths.length);
    return { metrics, rollout, rewards };
  };
  return {
    models: ['actor', 'critic', ...referenceOf(klCoefficient), 'reward'],

    async iterate({ actor, critic, reference, reward }, prompts, context) {
      const update = { epochs, miniBatches, iteration: context.iteration };
      const mixed = { ...update, also: pretrainingMix(context, settings.ptxCoefficient ?? 0) };

      const rollout = actor.generateSequences(prompts, { iteration: context.iteration });
      const values = critic.computeValues(rollout);
      const anchor = anchorOf(reference, rollout, klCoefficient);
      const given = reward.computeRewards(rollout);
      const made = makeExperience(...(await Promise.all([rollout, values, anchor, given])), settings, beta.coefficient);
      const ofCritic = critic.update(made.experience, valueLoss({ clip: settings.valueClip }), update);
      const ofActor = actor.update(made.experience, actorLoss(settings, beta.coefficient), mixed);
      return report(made, await Promise.all([rollout, given, ofCritic, ofActor]));
    },

    state: () => ({ klCoefficient: beta.coefficient }),
    restore: (state) => beta.restore({ coefficient: Number(state.klCoefficient) }),
  };
}

/** r_t = score at the last token − β (log π_old − log π_ref);  A, R = GAE(r, V);  A whitened over the whole rollout. */
export function makeExperience(
  rollout: Rollout,
  values: Float32Array,
  referenceLogprobs: Float32Array,
  rewards: Rewards,
  settings: PpoSettings,
  beta: number,
): { experience: Experience; penalty: KlPenalty } {
  const { lengths, logprobs } = rollout;
  const mask = learnedMask(rollout, settings);
  const penalty = klPenalty(
    { lengths, mask, scores: placeScores(rollout, rewards, settings), logprobs, reference: referenceLogprobs },
    { coefficient: settings.kl.in === 'reward' ? beta : 0, estimator: settings.kl.estimator },
  );
  const { advantages, returns } = gae({ lengths, mask, rewards: penalty.rewards, values }, settings);
  const columns = {
    referenceLogprobs,
    oldValues: values,
    returns,
    advantages: settings.whiten ? whiten(advantages, mask) : advantages,
  };
  return { experience: sampledExperience(rollout, mask, columns), penalty };
}

/** L = −E_t[ min( ρ_t A_t, clip(ρ_t, 1−ε, 1+ε) A_t ) ] − c_H E_t[H] (+ β E_t[KL]),  ρ_t = π(a_t) / π_old(a_t)   (eq. 7). */
export const actorLoss = (
  { kl, ...settings }: Pick<PpoSettings, 'clip' | 'clipHigh' | 'dualClip' | 'entropyCoefficient' | 'kl'>,
  beta: number,
) => policyLoss({ ...settings, kl: kl.in === 'loss' ? { coefficient: beta, estimator: kl.estimator } : undefined });
