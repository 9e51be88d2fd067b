/**
 * ReMax: REINFORCE whose baseline is the score of the greedy answer to the same prompt; no critic.
 * Li et al. 2023, arXiv:2310.10505 (algorithm 1, eq. 7); the KL penalty as in the authors' code.
 */
import { overTokens, returnsToGo } from '../losses/group-advantages.js';
import { klPenalty } from '../losses/kl.js';
import { policyLosses } from '../losses/policy-losses.js';
import { mean } from '../losses/statistics.js';
import { remaxReturns } from '../losses/token-baselines.js';
import { type Rewards, type Rollout, type RolloutAlgorithm, stateless } from './algorithm.js';
import { actorMetrics, klMetrics, rolloutMetrics } from './metrics.js';
import { anchorOf, referenceOf } from './reference.js';
import { learnedMask, penalisedScores, placeScores, sampledExperience, type TruncationSettings } from './rollout.js';

export interface RemaxSettings extends TruncationSettings {
  readonly epochs: number;
  readonly miniBatches: number;
  /** Answers per prompt; one greedy answer serves them all. */
  readonly samples: number;
  /** γ: discount of the score by the distance to the last token. */
  readonly gamma: number;
  /** β: weight of the KL penalty; 0: none, and no reference model. */
  readonly klCoefficient: number;
  /** Whether a token pays for its own KL (the authors' code), or for its own and all that follows. */
  readonly klReturn: 'token' | 'to-go';
}

/** One iteration: sampled and greedy answers, what reference and reward say of them, updates of the policy. */
export function remax(settings: RemaxSettings): RolloutAlgorithm<'actor' | 'reference' | 'reward'> {
  const { epochs, miniBatches, samples, klCoefficient } = settings;
  return {
    models: ['actor', ...referenceOf(klCoefficient), 'reward'],

    async iterate({ actor, reference, reward }, prompts, { iteration }) {
      const questions = prompts.filter((_, i) => i % samples === 0);
      const sampled = actor.generateSequences(prompts, { iteration });
      const greedy = actor.generateSequences(questions, { iteration, greedy: true });
      const calls = [
        anchorOf(reference, sampled, klCoefficient),
        reward.computeRewards(sampled),
        greedy,
        reward.computeRewards(greedy),
      ] as const;
      const ready = await Promise.all([sampled, ...calls]);
      const [rollout, , rewards, , baseline] = ready;
      const { experience, penalty } = makeExperience(...ready, settings);
      const ofActor = await actor.update(experience, policyLosses.reinforce({}), { epochs, miniBatches, iteration });
      const metrics = {
        ...rolloutMetrics(rollout, rewards, settings),
        'reward.greedy': mean(baseline.scores),
        ...(klCoefficient > 0 ? klMetrics(penalty, klCoefficient) : {}),
        ...actorMetrics(ofActor),
      };
      return { metrics, rollout, rewards };
    },

    ...stateless,
  };
}

/** A_t = −β d_t + γ^(T−t) (r − r_greedy); `to-go`: Σ_{s≥t} γ^(s−t) (r_s − β d_s) − r_greedy. */
export function makeExperience(
  rollout: Rollout,
  referenceLogprobs: Float32Array,
  rewards: Rewards,
  greedy: Rollout,
  greedyRewards: Rewards,
  { samples, gamma, klCoefficient, klReturn, ...truncation }: RemaxSettings,
) {
  const { lengths, logprobs } = rollout;
  const mask = learnedMask(rollout, truncation);
  const penalty = klPenalty(
    { lengths, mask, scores: placeScores(rollout, rewards, truncation), logprobs, reference: referenceLogprobs },
    { coefficient: klCoefficient, estimator: 'k1' },
  );
  const scores = penalisedScores(rollout, rewards, truncation);
  const ofGreedy = penalisedScores(greedy, greedyRewards, truncation);
  const baselines = scores.map((_, row) => ofGreedy[Math.floor(row / samples)]!);
  const overAnswers = overTokens(baselines, lengths, mask);
  const advantages =
    klReturn === 'token'
      ? remaxReturns({ lengths, mask, kl: penalty.kl, scores, baselines }, { beta: klCoefficient, gamma })
      : returnsToGo({ lengths, mask, rewards: penalty.rewards }, gamma).map((gain, t) => gain - overAnswers[t]!);
  return { experience: sampledExperience(rollout, mask, { advantages }), penalty };
}
