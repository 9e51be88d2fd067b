/**
 * PPO as a program over workers. They may lie in one pool or in several (`placement`); the iteration does not change.
 * β is constant here: the adaptive controller and the pretraining mix are in the library's own iteration.
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
  ppoLoss,
  rolloutMetrics,
} from 'lockstep-rlhf/algorithms';
import { valueLoss } from 'lockstep-rlhf/losses';

export default ({ ppo: settings, rollout: { truncation, truncationPenalty } }: ConfigOf<'ppo'>) =>
  defineAlgorithm({
    models: ['actor', 'critic', 'reference', 'reward'],

    async iterate({ actor, critic, reference, reward }, prompts, { iteration }) {
      const { epochs, miniBatches, valueClip, klCoefficient } = settings;
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
      const ofActor = actor.update(experience, ppoLoss(settings, klCoefficient), update);

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
