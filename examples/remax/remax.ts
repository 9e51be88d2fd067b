/**
 * ReMax as a program: PPO with one generation more, the greedy answers, and no critic.
 *
 *     npx lockstep train examples/remax/remax.yaml
 */
import type { ConfigOf } from 'lockstep-rlhf';
import { actorMetrics, defineAlgorithm, klMetrics, remaxExperience, rolloutMetrics } from 'lockstep-rlhf/algorithms';
import { policyLosses } from 'lockstep-rlhf/losses';

export default ({ remax: settings, rollout: { truncation, truncationPenalty, samples } }: ConfigOf<'remax'>) =>
  defineAlgorithm({
    models: ['actor', 'reference', 'reward'],

    async iterate({ actor, reference, reward }, prompts, { iteration }) {
      const update = { epochs: settings.epochs, miniBatches: settings.miniBatches, iteration };
      const cuts = { truncation, truncationPenalty, samples };
      const questions = prompts.filter((_, i) => i % samples === 0);

      // One iteration.
      const sampled = actor.generateSequences(prompts, { iteration });
      const greedy = actor.generateSequences(questions, { iteration, greedy: true });
      const anchor = reference.computeLogprobs(sampled);
      const scored = reward.computeRewards(sampled);
      const baseline = reward.computeRewards(greedy);
      const ready = await Promise.all([sampled, anchor, scored, greedy, baseline]);
      const { experience, penalty } = remaxExperience(...ready, { ...settings, ...cuts });
      const ofActor = actor.update(experience, policyLosses.reinforce({}), update);

      const [rollout, , rewards] = ready;
      const metrics = {
        ...rolloutMetrics(rollout, rewards, cuts),
        ...klMetrics(penalty, settings.klCoefficient),
        ...actorMetrics(await ofActor),
      };
      return { metrics, rollout, rewards };
    },
  });
