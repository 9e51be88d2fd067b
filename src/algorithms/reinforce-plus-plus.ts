/**
 * REINFORCE++: PPO's clipped loss on returns of the whole answer, whitened over the whole rollout; no critic.
 * Hu 2025, arXiv:2501.03262. Its baseline form subtracts the mean score of the prompt's answers first.
 */
import { groupAdvantages, overTokens, returnsToGo } from '../losses/group-advantages.js';
import { type KlEstimator, klPenalty } from '../losses/kl.js';
import { policyLoss } from '../losses/policy.js';
import { whiten } from '../losses/statistics.js';
import { type Rewards, type Rollout, type RolloutAlgorithm, stateless } from './algorithm.js';
import { actorMetrics, klMetrics, rolloutMetrics } from './metrics.js';
import { anchorOf, referenceOf } from './reference.js';
import {
  learnedMask,
  penalisedScores,
  placeScores,
  sampledExperience,
  sumsBySequence,
  type TruncationSettings,
} from './rollout.js';

export interface ReinforcePlusPlusSettings extends TruncationSettings {
  readonly epochs: number;
  readonly miniBatches: number;
  /** Answers per prompt. */
  readonly samples: number;
  /** The baseline form: the group's mean is subtracted, and the KL term is part of the loss instead of the reward. */
  readonly baseline: boolean;
  readonly clip: number;
  /** γ of the returns. */
  readonly gamma: number;
  /** β; 0: no KL term, and no reference model. */
  readonly klCoefficient: number;
  readonly klEstimator: KlEstimator;
  readonly entropyCoefficient: number;
}

/** One iteration: a rollout, what reference and reward say of it, updates of the policy. */
export function reinforcePlusPlus(
  settings: ReinforcePlusPlusSettings,
): RolloutAlgorithm<'actor' | 'reference' | 'reward'> {
  const { epochs, miniBatches, klCoefficient } = settings;
  return {
    models: ['actor', ...referenceOf(klCoefficient), 'reward'],

    async iterate({ actor, reference, reward }, prompts, { iteration }) {
      const sampled = actor.generateSequences(prompts, { iteration });
      const calls = [anchorOf(reference, sampled, klCoefficient), reward.computeRewards(sampled)] as const;
      const [rollout, anchor, rewards] = await Promise.all([sampled, ...calls]);
      const { experience, penalty } = makeExperience(rollout, anchor, rewards, settings);
      const ofActor = await actor.update(experience, actorLoss(settings), { epochs, miniBatches, iteration });
      const metrics = {
        ...rolloutMetrics(rollout, rewards, settings),
        ...(klCoefficient > 0 ? klMetrics(penalty, klCoefficient) : {}),
        ...actorMetrics(ofActor),
      };
      return { metrics, rollout, rewards };
    },

    ...stateless,
  };
}

/** A_t = whiten( Σ_{s≥t} γ^(s−t) (r_s − β KL_s) );  baseline form: A_t = whiten( r − mean of the group ). */
export function makeExperience(
  rollout: Rollout,
  referenceLogprobs: Float32Array,
  rewards: Rewards,
  settings: ReinforcePlusPlusSettings,
) {
  const { lengths, logprobs } = rollout;
  const { baseline, klCoefficient, klEstimator, gamma } = settings;
  const mask = learnedMask(rollout, settings);
  const penalty = klPenalty(
    { lengths, mask, scores: placeScores(rollout, rewards, settings), logprobs, reference: referenceLogprobs },
    { coefficient: baseline ? 0 : klCoefficient, estimator: klEstimator },
  );
  const returns = baseline
    ? overTokens(aboveMean(rollout, rewards, settings), lengths, mask)
    : returnsToGo({ lengths, mask, rewards: penalty.rewards }, gamma);
  // Its authors divide by n, not n − 1.
  const advantages = whiten(returns, mask, { variance: 'population' });
  return { experience: sampledExperience(rollout, mask, { advantages, referenceLogprobs }), penalty };
}

/** r_i − mean of the scores of its prompt's answers. */
function aboveMean(rollout: Rollout, rewards: Rewards, settings: ReinforcePlusPlusSettings): Float64Array {
  const scores = penalisedScores(rollout, rewards, settings);
  const groups = scores.map((_, row) => Math.floor(row / settings.samples));
  return groupAdvantages['reinforce++-baseline']({
    scores,
    groups,
    lengths: sumsBySequence(rollout, learnedMask(rollout, settings)),
  });
}

/** PPO's clipped surrogate; in the baseline form + β KL. */
const actorLoss = ({ clip, entropyCoefficient, baseline, klCoefficient, klEstimator }: ReinforcePlusPlusSettings) =>
  policyLoss({
    clip,
    entropyCoefficient,
    kl: baseline && klCoefficient > 0 ? { coefficient: klCoefficient, estimator: klEstimator } : undefined,
  });
