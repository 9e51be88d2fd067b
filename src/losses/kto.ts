/**
 * KTO: learning from answers that are desirable or not, without pairs.
 * Ethayarajh et al. 2024, arXiv:2402.01306, section 4.
 */
import { meanOverTokens, perCount } from './aggregation.js';
import type { Loss, LossInputs } from './loss.js';
import type { Numbers } from './selection.js';
import type { Scalar, TokenArray } from './tokens.js';

export interface KtoSettings {
  /** β, greater than 0: the weight of the implicit KL constraint. */
  readonly beta: number;
  /** λ_D: the weight of desirable answers. 1 by default. */
  readonly desirableWeight?: number | undefined;
  /** λ_U: the weight of undesirable answers. 1 by default. */
  readonly undesirableWeight?: number | undefined;
}

type KtoColumn = 'logprobs' | 'referenceLogprobs' | 'desirable' | 'klBaseline';

/**
 * z = max(0, mean of (log π − log q) over answers that belong to other prompts): the point of reference, an estimate of
 * KL(π‖q) in nats per answer. Both arguments hold sums of log-probs, one per mismatched pair of the whole mini-batch. It
 * carries no gradient: give it to the loss as the column `klBaseline`. 0 without pairs.
 */
export function ktoBaseline(policySums: Numbers, referenceSums: Numbers): number {
  let sum = 0;
  for (let i = 0; i < policySums.length; i++) sum += policySums[i]! - referenceSums[i]!;
  return Math.max(0, sum / Math.max(policySums.length, 1));
}

/**
 * Mean over all answers of λ_D (1 − σ(β(d − z))) where the answer is desirable, else λ_U (1 − σ(β(z − d))), with d the sum
 * of log π − log q over the answer. The columns `desirable` (1 or 0) and `klBaseline` (z) hold the same number at every
 * learned token of an answer, so the loss is additive over micro-batches; an answer without a learned token adds 0.
 * Statistics: `desirable`, the fraction of such answers; `rewardsDesirable` and `rewardsUndesirable`, the sums of β d over
 * either kind / all answers (divided by the kind's fraction: its mean); `klBaseline`, z.
 */
export function kto({ beta, desirableWeight = 1, undesirableWeight = 1 }: KtoSettings): Loss<KtoColumn> {
  return {
    couples: 'sequence',
    reads: ['logprobs', 'referenceLogprobs', 'desirable', 'klBaseline'],
    formula(t) {
      const gain = logRatioOfAnswer(t).minus(t.klBaseline).times(beta);
      // 1 − σ(x) = σ(−x).
      const desirable = gain.negate().sigmoid().times(desirableWeight);
      const undesirable = gain.sigmoid().times(undesirableWeight);
      return meanOverAnswers(desirable.where(t.desirable, undesirable));
    },
    statistics(t) {
      const reward = logRatioOfAnswer(t).times(beta);
      return {
        desirable: meanOverAnswers(t.desirable),
        rewardsDesirable: meanOverAnswers(reward.where(t.desirable, 0)),
        rewardsUndesirable: meanOverAnswers(reward.where(t.desirable.lessThan(1), 0)),
        klBaseline: meanOverTokens(t.klBaseline),
      };
    },
  };
}

/** d of an answer, at each of its tokens. */
const logRatioOfAnswer = (t: LossInputs<'logprobs' | 'referenceLogprobs'>): TokenArray =>
  t.logprobs.minus(t.referenceLogprobs).sumBySequence().overTokens();

/** Mean over all answers of a number that is the same at each token of an answer. */
const meanOverAnswers = (x: TokenArray): Scalar => perCount(x.meanBySequence().sum(), x.selection.totals.rows);
