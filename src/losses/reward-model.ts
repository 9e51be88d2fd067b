/**
 * Losses of reward and cost models over pairs: rows 2i and 2i+1 of a batch are the chosen and the rejected answer, each
 * with exactly one learned position, the last token, whose value is the score.
 * Ouyang et al. 2022, arXiv:2203.02155, eq. 1 (Bradley and Terry 1952); margin: Llama 2, arXiv:2307.09288, eq. 2;
 * centering: Eisenstein et al. 2023, arXiv:2312.09244; cost model: Dai et al. 2023, arXiv:2310.12773.
 */
import type { Loss } from './loss.js';
import { meanOverPairs, type Pairs, pairs } from './pairs.js';
import type { TokenArray } from './tokens.js';

export interface RewardLossSettings {
  /** k of k · mean (c + r)²: keeps scores around 0. 0 by default. */
  readonly centering?: number | undefined;
  /** k of k · mean over both answers of score² (Safe-RLHF's code). 0 by default. */
  readonly regularization?: number | undefined;
}

/**
 * L = mean over pairs of −log σ(c − r − margin), plus centering and regularization. The column `margins` holds the margin
 * at the chosen answer's learned position (0: none). Statistics: `accuracy`, the fraction with c > r, and `margin`, the
 * mean of c − r.
 */
export function bradleyTerry(settings: RewardLossSettings = {}): Loss<'values' | 'margins'> {
  const { centering = 0, regularization = 0 } = settings;
  return {
    couples: 'pair',
    reads: ['values', 'margins'],
    formula(t) {
      const { chosen, rejected } = scores(t.values);
      const difference = chosen.minus(rejected).minus(scores(t.margins).chosen);
      let loss = difference.logSigmoid().negate();
      if (centering !== 0) loss = loss.plus(chosen.plus(rejected).square().times(centering));
      if (regularization !== 0) {
        loss = loss.plus(
          chosen
            .square()
            .plus(rejected.square())
            .times(regularization / 2),
        );
      }
      return meanOverPairs(loss, t.values.selection);
    },
    statistics({ values }) {
      const { chosen, rejected } = scores(values);
      return {
        accuracy: meanOverPairs(chosen.greaterThan(rejected), values.selection),
        margin: meanOverPairs(chosen.minus(rejected), values.selection),
      };
    },
  };
}

/**
 * L = mean over pairs of −log σ(c_u − c_s) − log σ(z_u c_u) − log σ(z_s c_s): the chosen answer is the safer one (s), a
 * higher score is less safe, and the column `unsafe` holds z = +1 for an unsafe answer and −1 for a safe one. Statistics:
 * `accuracy`, the fraction with c_u > c_s, and `margin`, the mean of c_u − c_s.
 */
export function costModel(): Loss<'values' | 'unsafe'> {
  return {
    couples: 'pair',
    reads: ['values', 'unsafe'],
    formula(t) {
      const { chosen: safer, rejected: worse } = scores(t.values);
      const signs = scores(t.unsafe);
      const ranking = worse.minus(safer).logSigmoid();
      const signed = worse.times(signs.rejected).logSigmoid().plus(safer.times(signs.chosen).logSigmoid());
      return meanOverPairs(ranking.plus(signed).negate(), t.values.selection);
    },
    statistics({ values }) {
      const { chosen: safer, rejected: worse } = pairs(values.sumBySequence());
      return {
        accuracy: meanOverPairs(worse.greaterThan(safer), values.selection),
        margin: meanOverPairs(worse.minus(safer), values.selection),
      };
    },
  };
}

/** One learned position a row: its value is the sum of the row. */
const scores = (values: TokenArray): Pairs => pairs(values.sumBySequence());
