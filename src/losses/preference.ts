/**
 * Losses that learn a policy from preferences, without a reward model: rows 2i and 2i + 1 of a batch are the chosen and the
 * rejected answer to one prompt, and the mask selects the tokens of the answers.
 * DPO: Rafailov et al. 2023, arXiv:2305.18290, eq. 7; cDPO: Mitchell 2023, ericmitchell.ai/cdpo.pdf; IPO: Azar et al. 2023,
 * arXiv:2310.12036, eq. 17; hinge: SLiC-HF, Zhao et al. 2023, arXiv:2305.10425; robust: Ray Chowdhury et al. 2024,
 * arXiv:2403.00409; APO: D'Oosterlinck et al. 2024, arXiv:2408.06266; SPPO: Wu et al. 2024, arXiv:2405.00675; EXO: Ji et
 * al. 2024, arXiv:2402.00856; SimPO: Meng et al. 2024, arXiv:2405.14734; ORPO: Hong et al. 2024, arXiv:2403.07691.
 */
import { perCount } from './aggregation.js';
import type { Loss } from './loss.js';
import { meanOverPairs, type Pairs, pairs } from './pairs.js';
import type { Selection } from './selection.js';
import type { Scalar, SequenceArray, TokenArray } from './tokens.js';

export interface PreferenceSettings {
  /** β, greater than 0: the weight of the implicit KL constraint; for ORPO the weight of the odds ratio. */
  readonly beta: number;
}

export interface SmoothedPreferenceSettings extends PreferenceSettings {
  /** ε: the probability that a label is wrong, below ½. 0 by default. */
  readonly labelSmoothing?: number | undefined;
}

export interface ExoSettings extends PreferenceSettings {
  /** ε between 0 and 1, both excluded: the target is (1 − ε, ε). 1e-3 by default (its authors' code). */
  readonly labelSmoothing?: number | undefined;
}

export interface IpoSettings extends PreferenceSettings {
  /** Log ratios are means over the answer's tokens (TRL, AReaL) instead of sums (the paper). Off by default. */
  readonly lengthNormalised?: boolean | undefined;
}

export interface SimpoSettings extends PreferenceSettings {
  /** γ: the margin between the rewards. 1 by default (its authors' code: 0.5, with β 2). */
  readonly gamma?: number | undefined;
}

type ReferenceLoss = Loss<'logprobs' | 'referenceLogprobs'>;

/**
 * Settings to loss, by name. d = log π(answer) − log q(answer), sums over the answer's tokens; h = β (d_chosen − d_rejected).
 * Each is a mean over the pairs of the mini-batch. Statistics, over the same pairs: `rewardsChosen` and `rewardsRejected`,
 * the mean implicit rewards (β d; β times the mean log-prob for SimPO and ORPO), `margin`, their difference, and `accuracy`,
 * the fraction of pairs whose chosen answer has the greater one.
 */
export const preferenceLosses = {
  /** −(1 − ε) log σ(h) − ε log σ(−h): DPO, and with ε > 0 cDPO. */
  dpo({ beta, labelSmoothing = 0 }: SmoothedPreferenceSettings): ReferenceLoss {
    return referenceLoss(beta, (d) => {
      const h = difference(d).times(beta);
      return h
        .logSigmoid()
        .times(labelSmoothing - 1)
        .minus(h.negate().logSigmoid().times(labelSmoothing));
    });
  },

  /** (d_chosen − d_rejected − 1/(2β))². */
  ipo({ beta, lengthNormalised = false }: IpoSettings): ReferenceLoss {
    const perAnswer = lengthNormalised ? means : sums;
    return referenceLoss(beta, (d) => difference(d).minus(halfInverse(beta)).square(), perAnswer);
  },

  /** max(0, 1 − h). */
  hinge({ beta }: PreferenceSettings): ReferenceLoss {
    return referenceLoss(beta, (d) => difference(d).times(-beta).plus(1).max(0));
  },

  /** (−(1 − ε) log σ(h) + ε log σ(−h)) / (1 − 2ε): an unbiased estimate of DPO's loss on labels without noise. */
  robust({ beta, labelSmoothing = 0 }: SmoothedPreferenceSettings): ReferenceLoss {
    return referenceLoss(beta, (d) => {
      const h = difference(d).times(beta);
      return h
        .logSigmoid()
        .times(labelSmoothing - 1)
        .plus(h.negate().logSigmoid().times(labelSmoothing))
        .divide(1 - 2 * labelSmoothing);
    });
  },

  /** 1 − σ(β d_chosen) + σ(β d_rejected). */
  'apo-zero'({ beta }: PreferenceSettings): ReferenceLoss {
    return referenceLoss(beta, ({ chosen, rejected }) =>
      chosen.times(-beta).sigmoid().plus(rejected.times(beta).sigmoid()),
    );
  },

  /** (d_chosen − 1/(2β))² + (d_rejected + 1/(2β))². */
  'sppo-hard'({ beta }: PreferenceSettings): ReferenceLoss {
    return referenceLoss(beta, ({ chosen, rejected }) =>
      chosen
        .minus(halfInverse(beta))
        .square()
        .plus(rejected.plus(halfInverse(beta)).square()),
    );
  },

  /** KL((σ(h), σ(−h)) ‖ (1 − ε, ε)). */
  'exo-pair'({ beta, labelSmoothing = 1e-3 }: ExoSettings): ReferenceLoss {
    return referenceLoss(beta, (d) => {
      const h = difference(d).times(beta);
      const term = (x: SequenceArray, target: number) => x.sigmoid().times(x.logSigmoid().minus(Math.log(target)));
      return term(h, 1 - labelSmoothing).plus(term(h.negate(), labelSmoothing));
    });
  },

  /** −log σ(β m_chosen − β m_rejected − γ), m the mean log π of the answer's tokens. No reference. */
  simpo({ beta, gamma = 1 }: SimpoSettings): Loss<'logprobs'> {
    return {
      couples: 'pair',
      reads: ['logprobs'],
      formula({ logprobs }) {
        const margin = difference(means(logprobs)).times(beta);
        return meanOverPairs(margin.minus(gamma).logSigmoid().negate(), logprobs.selection);
      },
      statistics: ({ logprobs }) => rewardStatistics(means(logprobs), beta, logprobs.selection),
    };
  },

  /**
   * nll − β log σ(log odds_chosen − log odds_rejected), nll the token mean of −log π over the chosen answers. No reference.
   * Adds the statistics `nll` and `logOdds`, the mean of the difference of the log odds.
   */
  orpo({ beta }: PreferenceSettings): Loss<'logprobs'> {
    return {
      couples: 'pair',
      reads: ['logprobs'],
      formula({ logprobs }) {
        const preferred = logOddsRatio(logprobs).logSigmoid();
        return chosenNll(logprobs).minus(meanOverPairs(preferred, logprobs.selection).times(beta));
      },
      statistics: ({ logprobs }) => ({
        ...rewardStatistics(means(logprobs), beta, logprobs.selection),
        nll: chosenNll(logprobs),
        logOdds: meanOverPairs(logOddsRatio(logprobs), logprobs.selection),
      }),
    };
  },
} satisfies Record<string, (settings: never) => Loss>;

export type PreferenceLossName = keyof typeof preferenceLosses;

/** 1 − p of a token whose float32 log-prob rounds to 0 is taken to be this, so that its odds are finite. */
const smallestComplement = 2 ** -24;

/**
 * Per pair: log odds_chosen − log odds_rejected with log odds = m − log(1 − e^m), m the mean log-prob of the answer's tokens.
 */
export function logOddsRatio(logprobs: TokenArray): SequenceArray {
  const logOdds = (m: SequenceArray) => m.minus(m.exp().negate().plus(1).max(smallestComplement).log());
  const { chosen, rejected } = means(logprobs);
  return logOdds(chosen).minus(logOdds(rejected));
}

/** −Σ log π over the chosen answers / their tokens in the mini-batch. */
const chosenNll = (logprobs: TokenArray): Scalar =>
  perCount(sums(logprobs).chosen.sum().negate(), logprobs.selection.totals.chosenTokens);

/** A loss of the log ratios d to the reference, of which `perAnswer` makes one number per answer. */
function referenceLoss(
  beta: number,
  perPair: (d: Pairs) => SequenceArray,
  perAnswer: (perToken: TokenArray) => Pairs = sums,
): ReferenceLoss {
  return {
    couples: 'pair',
    reads: ['logprobs', 'referenceLogprobs'],
    formula: ({ logprobs, referenceLogprobs }) =>
      meanOverPairs(perPair(perAnswer(logprobs.minus(referenceLogprobs))), logprobs.selection),
    statistics: ({ logprobs, referenceLogprobs }) =>
      rewardStatistics(sums(logprobs.minus(referenceLogprobs)), beta, logprobs.selection),
  };
}

function rewardStatistics({ chosen, rejected }: Pairs, beta: number, selection: Selection): Record<string, Scalar> {
  const mean = (perPair: SequenceArray) => meanOverPairs(perPair, selection);
  return {
    accuracy: mean(chosen.greaterThan(rejected)),
    margin: mean(chosen.minus(rejected)).times(beta),
    rewardsChosen: mean(chosen).times(beta),
    rewardsRejected: mean(rejected).times(beta),
  };
}

const sums = (perToken: TokenArray): Pairs => pairs(perToken.sumBySequence());
const means = (perToken: TokenArray): Pairs => pairs(perToken.meanBySequence());
const difference = ({ chosen, rejected }: Pairs): SequenceArray => chosen.minus(rejected);
const halfInverse = (beta: number): number => 1 / (2 * beta);
