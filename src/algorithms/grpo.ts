/**
 * Group relative policy optimisation and its relatives: several answers per prompt, each judged against the others; no critic.
 * GRPO: Shao et al. 2024, arXiv:2402.03300, eq. 3. As settings: Dr.GRPO arXiv:2503.20783; DAPO arXiv:2503.14476 (clip-higher,
 * dynamic sampling, overlong shaping); GSPO arXiv:2507.18071; CISPO arXiv:2506.13585; SAPO arXiv:2511.20347; GMPO arXiv:2507.20673;
 * OPO arXiv:2505.23585; RLOO arXiv:2402.14740 (rloo.ts).
 */
import { overlongPenalties } from '../data/overlong.js';
import type { Aggregation } from '../losses/aggregation.js';
import { type GroupAdvantageName, groupAdvantages, groupCounts, overTokens } from '../losses/group-advantages.js';
import { type KlEstimator, klPenalty } from '../losses/kl.js';
import type { Loss } from '../losses/loss.js';
import type { PolicyLossSettings } from '../losses/policy.js';
import { type PolicyLossName, policyLosses } from '../losses/policy-losses.js';
import { type Rewards, type Rollout, type RolloutAlgorithm, stateless } from './algorithm.js';
import { actorMetrics, klMetrics, rolloutMetrics } from './metrics.js';
import { anchorOf, referenceOf } from './reference.js';
import { learnedMask, penalisedScores, pretrainingMix, sampledExperience, sumsBySequence } from './rollout.js';
import { type SamplingSettings, sampleGroups } from './sampling.js';

export interface GrpoSettings extends SamplingSettings {
  readonly epochs: number;
  readonly miniBatches: number;
  readonly advantage: GroupAdvantageName;
  readonly loss: PolicyLossName;
  readonly aggregation: Aggregation;
  /** ε, or ε_low and ε_high (clip-higher). */
  readonly clip: number;
  readonly clipHigh?: number | undefined;
  readonly dualClip?: number | undefined;
  /** β; 0: no KL term, and no reference model. */
  readonly klCoefficient: number;
  readonly kl: { readonly in: 'reward' | 'loss'; readonly estimator: KlEstimator };
  readonly entropyCoefficient: number;
  /** Tokens before the most new tokens from which an answer costs, up to 1; 0: none. */
  readonly overlongBuffer: number;
  readonly maxNewTokens: number;
  readonly ptxCoefficient: number;
}

/** One iteration: groups of answers, rewards, the advantages of `settings`, updates of the policy. */
export function grpo(settings: GrpoSettings): RolloutAlgorithm<'actor' | 'reference' | 'reward'> {
  const { epochs, miniBatches, klCoefficient } = settings;
  const loss = actorLoss(settings);
  return {
    models: ['actor', ...referenceOf(klCoefficient), 'reward'],

    async iterate({ actor, reference, reward }, prompts, context) {
      const { iteration } = context;
      const { rollout, rewards, dropped, rounds } = await sampleGroups(actor, reward, prompts, context, settings);
      const anchor = await anchorOf(reference, rollout, klCoefficient);
      const { experience, penalty, equal } = makeExperience(rollout, anchor, rewards, settings);
      const also = pretrainingMix(context, settings.ptxCoefficient);
      const ofActor = await actor.update(experience, loss, { epochs, miniBatches, iteration, also });
      const metrics = {
        ...rolloutMetrics(rollout, rewards, settings),
        'groups.equal': equal,
        ...(settings.samplingRounds > 1 ? { 'groups.dropped': dropped, 'groups.rounds': rounds } : {}),
        ...(klCoefficient > 0 ? klMetrics(penalty, klCoefficient) : {}),
        ...actorMetrics(ofActor),
      };
      return { metrics, rollout, rewards };
    },

    ...stateless,
  };
}

/** A_i of the group, the same at every token; the score with the overlong penalty and, in the reward, −β Σ_t KL_t. */
export function makeExperience(
  rollout: Rollout,
  referenceLogprobs: Float32Array,
  rewards: Rewards,
  settings: GrpoSettings,
) {
  const { lengths, logprobs } = rollout;
  const mask = learnedMask(rollout, settings);
  const counts = sumsBySequence(rollout, mask);
  const penalty = klPenalty(
    { lengths, mask, scores: new Float64Array(mask.length), logprobs, reference: referenceLogprobs },
    { coefficient: settings.kl.in === 'reward' ? settings.klCoefficient : 0, estimator: settings.kl.estimator },
  );
  const ofKl = sumsBySequence(rollout, penalty.rewards);
  const ofLength = overlongScores(counts, settings);
  const scores = penalisedScores(rollout, rewards, settings).map((score, i) => score + ofKl[i]! + ofLength[i]!);
  const groups = { groups: scores.map((_, row) => Math.floor(row / settings.samples)), lengths: counts };
  const perAnswer = groupAdvantages[settings.advantage]({ ...groups, scores }, {});
  const columns = { advantages: overTokens(perAnswer, lengths, mask), referenceLogprobs };
  const { equal } = groupCounts({ ...groups, scores: rewards.scores });
  return { experience: sampledExperience(rollout, mask, columns), penalty, equal };
}

/** DAPO, eq. 13. */
const overlongScores = (counts: Float64Array, { maxNewTokens, overlongBuffer }: GrpoSettings): Float64Array =>
  overlongBuffer > 0
    ? overlongPenalties(counts, { maxLength: maxNewTokens, cache: overlongBuffer })
    : counts.map(() => 0);

/** Eq. 3 and its relatives: the surrogate of `loss`, aggregated, − c_H H, + β KL when it is in the loss. */
const actorLoss = ({ klCoefficient, kl, loss, ...settings }: GrpoSettings): Loss =>
  (policyLosses[loss] as (settings: PolicyLossSettings) => Loss)({
    ...settings,
    kl: kl.in === 'loss' && klCoefficient > 0 ? { coefficient: klCoefficient, estimator: kl.estimator } : undefined,
  });
