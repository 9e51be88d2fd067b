/**
 * Group relative policy optimisation and its relatives: several answers per prompt, each judged against the others; no critic.
 * GRPO: Shao et al. 2024, arXiv:2402.03300, eq. 3. As settings: Dr.GRPO arXiv:2503.20783; DAPO arXiv:2503.14476 (clip-higher,
 * dynamic sampling, overlong shaping); GSPO arXiv:2507.18071; CISPO arXiv:2506.13585; SAPO arXiv:2511.20347; GMPO arXiv:2507.20673;
 * OPO arXiv:2505.23585; RLOO arXiv:2402.14740 (rloo.ts).
 */
import type { Aggregation } from '../losses/aggregation.js';
import { keptGroups, overlongPenalty } from '../losses/dapo.js';
import { type GroupAdvantageName, groupAdvantages, groupStatistics, overTokens } from '../losses/group-advantages.js';
import { type KlEstimator, klPenalty } from '../losses/kl.js';
import { type PolicyLossName, policyLosses } from '../losses/policy-losses.js';
import {
  type ActorWorker,
  type Context,
  type Prompt,
  type Rewards,
  type RewardWorker,
  type Rollout,
  type RolloutAlgorithm,
  stateless,
} from './algorithm.js';
import { actorMetrics, klMetrics, rolloutMetrics } from './metrics.js';
import {
  joinRows,
  learnedMask,
  learnedTokens,
  penalisedScores,
  pretrainingMix,
  sampledExperience,
  type TruncationSettings,
} from './rollout.js';

export interface GrpoSettings extends TruncationSettings {
  readonly epochs: number;
  readonly miniBatches: number;
  /** G: answers per prompt, at least 2. */
  readonly samples: number;
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
  /** Rounds of sampling in which groups of equal scores are replaced by those of other prompts; 1: they stay. */
  readonly samplingRounds: number;
  /** Tokens before the most new tokens from which an answer costs, up to 1; 0: none. */
  readonly overlongBuffer: number;
  readonly maxNewTokens: number;
  readonly ptxCoefficient: number;
}

export function grpo(settings: GrpoSettings): RolloutAlgorithm {
  const { epochs, miniBatches, klCoefficient } = settings;
  const loss = actorLoss(settings);
  return {
    models: klCoefficient > 0 ? ['actor', 'reference', 'reward'] : ['actor', 'reward'],

    async iterate({ actor, reference, reward }, prompts, context) {
      const { iteration } = context;
      const { rollout, rewards, dropped } = await sampleGroups(actor, reward, prompts, context, settings);
      const anchor = klCoefficient > 0 ? await reference.computeLogprobs(rollout) : rollout.logprobs;
      const { experience, penalty, equal } = makeExperience(rollout, anchor, rewards, settings);
      const also = pretrainingMix(context, settings.ptxCoefficient);
      const ofActor = await actor.update(experience, loss, { epochs, miniBatches, iteration, also });
      const metrics = {
        ...rolloutMetrics(rollout, rewards, settings),
        'groups.equal': equal,
        'groups.dropped': dropped,
        ...(klCoefficient > 0 ? klMetrics(penalty, klCoefficient) : {}),
        ...actorMetrics(ofActor),
      };
      return { metrics, rollout, rewards };
    },

    ...stateless,
  };
}

/** Dynamic sampling (DAPO, eq. 11): groups whose scores are all equal teach nothing; in later rounds other prompts replace them. */
async function sampleGroups(
  actor: ActorWorker,
  reward: RewardWorker,
  prompts: readonly Prompt[],
  { iteration, draw }: Context,
  { samples, samplingRounds }: GrpoSettings,
) {
  const parts: { rollout: Rollout; rewards: Rewards; rows: readonly number[] }[] = [];
  let missing = prompts.length;
  for (let round = 0; round < samplingRounds && missing > 0; round++) {
    const asked = round === 0 ? prompts : await draw!(missing / samples);
    const sampled = actor.generateSequences(asked, { iteration, round });
    const [rollout, rewards] = await Promise.all([sampled, reward.computeRewards(sampled)]);
    const rows = samplingRounds > 1 ? unequalRows(rewards.scores, samples) : [...rewards.scores.keys()];
    parts.push({ rollout, rewards, rows });
    missing -= rows.length;
  }
  // With nothing to learn from, the first round is learned from as it is: every advantage is 0.
  const all = { ...parts[0]!, rows: [...parts[0]!.rewards.scores.keys()] };
  const kept = parts.some(({ rows }) => rows.length > 0) ? parts : [all];
  const sampledRows = parts.reduce((sum, { rewards }) => sum + rewards.scores.length, 0);
  const keptRows = kept.reduce((sum, { rows }) => sum + rows.length, 0);
  return { rollout: joinRows(kept), rewards: joinRewards(kept), dropped: (sampledRows - keptRows) / samples };
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
  const { samples, kl, klCoefficient, overlongBuffer, maxNewTokens } = settings;
  const penalty = klPenalty(
    { lengths, mask, scores: new Float64Array(mask.length), logprobs, reference: referenceLogprobs },
    { coefficient: kl.in === 'reward' ? klCoefficient : 0, estimator: kl.estimator },
  );
  const ofKl = sumsBySequence(rollout, penalty.rewards);
  const scores = penalisedScores(rollout, rewards, settings).map(
    (score, row) =>
      score + overlongPenalty(counts[row]!, { maximum: maxNewTokens, buffer: overlongBuffer }) + ofKl[row]!,
  );
  const groups = scores.map((_, row) => Math.floor(row / samples));
  const perAnswer = groupAdvantages[settings.advantage]({ scores, groups, lengths: counts });
  const columns = { advantages: overTokens(perAnswer, lengths, mask), referenceLogprobs };
  return {
    experience: sampledExperience(rollout, mask, columns),
    penalty,
    equal: groupStatistics({ scores, groups }).equal,
  };
}

/** Eq. 3 and its relatives: the clipped surrogate of `loss`, aggregated, − c_H H, + β KL when it is in the loss. */
const actorLoss = ({ klCoefficient, kl, loss, ...settings }: GrpoSettings) =>
  policyLosses[loss]({
    ...settings,
    kl: kl.in === 'loss' && klCoefficient > 0 ? { coefficient: klCoefficient, estimator: kl.estimator } : undefined,
  });
