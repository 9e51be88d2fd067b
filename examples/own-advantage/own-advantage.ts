/**
 * An advantage estimator of one's own, in 15 lines: an answer is judged by its rank among the answers to its prompt, so that neither
 * the scale of the reward nor an outlier matters.
 *
 *     npx lockstep train examples/own-advantage/own-advantage.yaml
 */
import type { ConfigOf } from 'lockstep-rlhf';
import { actorMetrics, defineAlgorithm, rolloutMetrics, sampledExperience } from 'lockstep-rlhf/algorithms';
import { overTokens, policyLoss } from 'lockstep-rlhf/losses';

/** From −1 for the worst of a group to 1 for the best; equal scores have equal ranks. */
function ranks(scores: Float64Array, samples: number): Float64Array {
  return scores.map((score, i) => {
    const group = scores.subarray(i - (i % samples), i - (i % samples) + samples);
    const below = group.filter((other) => other < score).length;
    const above = group.filter((other) => other > score).length;
    return (below - above) / (samples - 1);
  });
}

export default ({ rollout: { samples, truncation, truncationPenalty } }: ConfigOf<'grpo'>) =>
  defineAlgorithm({
    models: ['actor', 'reward'],

    async iterate({ actor, reward }, prompts, { iteration }) {
      const sampled = actor.generateSequences(prompts, { iteration });
      const [rollout, rewards] = await Promise.all([sampled, reward.computeRewards(sampled)]);
      const mask = rollout.responseMask;
      const advantages = overTokens(ranks(rewards.scores, samples), rollout.lengths, mask);
      const experience = sampledExperience(rollout, mask, { advantages });
      const learned = await actor.update(experience, policyLoss({ clip: 0.2 }), {
        epochs: 1,
        miniBatches: 1,
        iteration,
      });
      const cuts = { truncation, truncationPenalty };
      return { metrics: { ...rolloutMetrics(rollout, rewards, cuts), ...actorMetrics(learned) }, rollout, rewards };
    },
  });
