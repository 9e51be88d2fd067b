/**
 * PPO as a program over workers. They may lie in one pool or in several (`placement`); the iteration does not change.
 *
 *     npx lockstep train examples/ppo/ppo.yaml
 */
import type { ConfigOf } from 'lockstep-rlhf';
import {
  actorMetrics,
  criticMetrics,
  defineAlgorithm,
  klMetrics,
  ppoExperience,
  rolloutMetrics,
} from 'lockstep-rlhf/algorithms';
import { policyLoss, valueLoss } from 'lockstep-rlhf/losses';

export default ({ ppo: settings, rollout: { truncation, truncationPenalty } }: ConfigOf<'ppo'>) =>
  defineAlgorithm({
    models: ['actor', 'critic', 'reference', 'reward'],

    async iterate({ actor, critic, reference, reward }, prompts, { iteration }) {
      const { epochs, miniBatches, clip, valueClip, klCoefficient } = settings;
      const update = { epochs, miniBatches, iteration };
      const cuts = { truncation, truncationPenalty };

      // One iteration: each call returns a future at once, and starts when what it was given is there.
      const sampled = actor.generateSequences(prompts, { iteration });
      const values = critic.computeValues(sampled);
      const anchor = reference.computeLogprobs(sampled);
      const scored = reward.computeRewards(sampled);
      const ready = await Promise.all([sampled, values, anchor, scored]);
      const { experience, penalty } = ppoExperience(...ready, { ...settings, ...cuts }, klCoefficient);
      const ofCritic = critic.update(experience, valueLoss({ clip: valueClip }), update);
      const ofActor = actor.update(experience, policyLoss({ clip }), update);

      const [rollout, , , rewards] = ready;
      const metrics = {
        ...rolloutMetrics(rollout, rewards, cuts),
        ...klMetrics(penalty, klCoefficient),
        ...criticMetrics(experience, await ofCritic),
        ...actorMetrics(await ofActor),
      };
      return { metrics, rollout, rewards };
    },
  });
