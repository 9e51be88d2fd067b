/**
 * On-policy distillation: the student samples, the teacher judges every token, the student descends the reverse KL.
 * Agarwal et al. 2023, arXiv:2306.13649 (GKD, on-policy data); Gu et al. 2023, arXiv:2306.08543 (MiniLLM, reverse KL).
 */
import { klPenalty } from '../losses/kl.js';
import { policyLoss } from '../losses/policy.js';
import { type Rollout, type RolloutAlgorithm, stateless } from './algorithm.js';
import { actorMetrics, klMetrics, rolloutMetrics } from './metrics.js';
import { learnedMask, sampledExperience, sumsBySequence, type TruncationSettings } from './rollout.js';

export interface DistillationSettings extends TruncationSettings {
  readonly epochs: number;
  readonly miniBatches: number;
  /** ε of the clipped surrogate, for steps after the first on one rollout. */
  readonly clip: number;
  readonly entropyCoefficient: number;
}

/** One iteration: the student samples and learns from what the teacher says of its tokens. */
export function distillation(settings: DistillationSettings): RolloutAlgorithm<'actor' | 'teacher'> {
  const { epochs, miniBatches, clip, entropyCoefficient } = settings;
  return {
    models: ['actor', 'teacher'],

    async iterate({ actor, teacher }, prompts, { iteration }) {
      const sampled = actor.generateSequences(prompts, { iteration });
      const [rollout, taught] = await Promise.all([sampled, teacher.computeLogprobs(sampled)]);
      const { experience, penalty } = makeExperience(rollout, taught, settings);
      const loss = policyLoss({ clip, entropyCoefficient });
      const ofActor = await actor.update(experience, loss, { epochs, miniBatches, iteration });
      // An answer's reward is Σ_t log q − log π.
      const rewards = { scores: sumsBySequence(rollout, penalty.rewards) };
      const metrics = {
        ...rolloutMetrics(rollout, rewards, settings),
        ...klMetrics(penalty, 1),
        ...actorMetrics(ofActor),
      };
      return { metrics, rollout, rewards };
    },

    ...stateless,
  };
}

/** A_t = log q(a_t) − log π_old(a_t), q the teacher: −∇ of its expectation is ∇KL(π‖q) of the token's distribution. */
export function makeExperience(rollout: Rollout, taught: Float32Array, settings: TruncationSettings) {
  const { lengths, logprobs } = rollout;
  const mask = learnedMask(rollout, settings);
  const penalty = klPenalty(
    { lengths, mask, scores: new Float64Array(mask.length), logprobs, reference: taught },
    { coefficient: 1, estimator: 'k1' },
  );
  return { experience: sampledExperience(rollout, mask, { advantages: penalty.rewards }), penalty };
}
