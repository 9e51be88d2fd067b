/**
 * Safe-RLHF as a program: PPO with a cost, its critic and a multiplier. The pretraining mix is in the library's own iteration.
 *
 *     npx lockstep train examples/safe-rlhf/safe-rlhf.yaml
 */
import type { ConfigOf } from 'lockstep-rlhf';
import {
  actorMetrics,
  costMetrics,
  criticMetrics,
  defineAlgorithm,
  klMetrics,
  rolloutMetrics,
  safeRlhfExperience,
} from 'lockstep-rlhf/algorithms';
import { lagrangeMultiplier, policyLoss, valueLoss } from 'lockstep-rlhf/losses';

export default ({ 'safe-rlhf': settings, rollout: { truncation, truncationPenalty } }: ConfigOf<'safe-rlhf'>) => {
  const multiplier = lagrangeMultiplier(settings.constraint);
  const cuts = { truncation, truncationPenalty };
  return defineAlgorithm({
    models: ['actor', 'critic', 'costCritic', 'reference', 'reward', 'cost'],

    async iterate({ actor, critic, costCritic, reference, reward, cost }, prompts, { iteration }) {
      const { epochs, miniBatches, valueClip } = settings;
      const update = { epochs, miniBatches, iteration };

      // One iteration.
      const sampled = actor.generateSequences(prompts, { iteration });
      const values = critic.computeValues(sampled);
      const costValues = costCritic.computeValues(sampled);
      const anchor = reference.computeLogprobs(sampled);
      const scored = reward.computeRewards(sampled);
      const charged = cost.computeCosts(sampled);
      const ready = await Promise.all([sampled, values, costValues, anchor, scored, charged]);
      multiplier.update(ready[5].scores);
      const { experience, penalty } = safeRlhfExperience(...ready, { ...settings, ...cuts }, multiplier.multiplier);
      const ofCritic = critic.update(experience.ofRewards, valueLoss({ clip: valueClip }), update);
      const ofCostCritic = costCritic.update(experience.ofCosts, valueLoss({ clip: valueClip }), update);
      const ofActor = actor.update(experience.ofPolicy, policyLoss(settings), update);

      const [rollout, , , , rewards, costs] = ready;
      const metrics = {
        ...rolloutMetrics(rollout, rewards, cuts),
        ...costMetrics(costs),
        'cost.multiplier': multiplier.multiplier,
        'cost.value.loss': (await ofCostCritic).loss,
        ...klMetrics(penalty, settings.klCoefficient),
        ...criticMetrics(experience.ofRewards, await ofCritic),
        ...actorMetrics(await ofActor),
      };
      return { metrics, rollout, rewards };
    },

    state: () => ({ ...multiplier.state() }),
    restore: (state) => multiplier.restore(state),
  });
};
