/**
 * Policy losses of single tokens beside PPO's: the score-function loss, and those that weight or gate it by the ratio.
 * REINFORCE: Williams 1992; GPG: Chu et al. 2025, arXiv:2504.02546; CISPO: MiniMax-M1, arXiv:2506.13585; SAPO: Gao et
 * al. 2025, arXiv:2511.20347; DPPO: arXiv:2602.04879; DRO: Richemond et al. 2024, arXiv:2405.19107.
 */
import { meanOverTokens } from './aggregation.js';
import type { Loss } from './loss.js';
import {
  logRatio,
  type PolicyColumn,
  type PolicyTermSettings,
  policyLossOf,
  type Surrogate,
  type SurrogateInputs,
} from './policy.js';
import type { TokenArray } from './tokens.js';

/** −A log π. */
const scoreFunction = (t: SurrogateInputs): TokenArray => t.advantages.negate().times(t.logprobs);

/** REINFORCE: agg(−A log π), Σ over the tokens of a sequence and mean over sequences by default. */
export const reinforce = (settings: PolicyTermSettings = {}): Loss<PolicyColumn> =>
  policyLossOf({ tokens: scoreFunction }, settings, { mode: 'seq-mean-token-sum' });

/** GPG: agg(−A log π) with the advantages of `groupAdvantages.gpg`, token mean by default. */
export const gpg = (settings: PolicyTermSettings = {}): Loss<PolicyColumn> =>
  policyLossOf({ tokens: scoreFunction }, settings);

export interface CispoSettings extends PolicyTermSettings {
  /** ε: the weight is ρ clipped to [1 − ε, 1 + ε]; `Infinity` leaves it without a lower bound. */
  readonly clip: number;
  /** Upper ε when it differs; TRL's absolute cap c is c − 1. */
  readonly clipHigh?: number | undefined;
}

/**
 * CISPO: −sg(clip(ρ, 1 − ε_low, 1 + ε_high)) A log π; every token keeps a gradient, that of log π alone. Token mean:
 * `clipFraction` (ρ beyond a bound).
 */
export function cispo(settings: CispoSettings): Loss<PolicyColumn> {
  const { clip, clipHigh = clip } = settings;
  const ratio = (t: SurrogateInputs) => logRatio(t, settings).exp();
  const surrogate: Surrogate = {
    tokens: (t) =>
      ratio(t)
        .clip(1 - clip, 1 + clipHigh)
        .stopGradient()
        .times(scoreFunction(t)),
    statistics(t) {
      const outside = ratio(t)
        .lessThan(1 - clip)
        .plus(ratio(t).greaterThan(1 + clipHigh));
      return { clipFraction: meanOverTokens(outside) };
    },
  };
  return policyLossOf(surrogate, settings);
}

export interface SapoSettings extends PolicyTermSettings {
  /** τ where A > 0; 1 by default. */
  readonly temperaturePositive?: number | undefined;
  /** τ where A ≤ 0; 1.05 by default. */
  readonly temperatureNegative?: number | undefined;
}

/**
 * SAPO: −(4/τ) σ(τ(ρ − 1)) A, a gate in the place of the clip; its derivative with respect to log π is −4 σ(1 − σ) ρ A,
 * which is −A at ρ = 1. Mean over sequences of their token means by default.
 */
export function sapo(settings: SapoSettings = {}): Loss<PolicyColumn> {
  const { temperaturePositive = 1, temperatureNegative = 1.05 } = settings;
  const gate = (distance: TokenArray, temperature: number) =>
    distance
      .times(temperature)
      .sigmoid()
      .times(4 / temperature);
  const surrogate: Surrogate = {
    tokens(t) {
      const distance = logRatio(t, settings).exp().minus(1);
      const gates = gate(distance, temperaturePositive).where(
        t.advantages.greaterThan(0),
        gate(distance, temperatureNegative),
      );
      return gates.times(t.advantages.negate());
    },
  };
  return policyLossOf(surrogate, settings, { mode: 'seq-mean-token-mean' });
}

export interface DppoSettings extends PolicyTermSettings {
  /**
   * δ: how far a token's probability may have moved in the direction of A; a token beyond is left out (the paper: 0.2).
   */
  readonly clip: number;
  /** δ where A > 0, when it differs. */
  readonly clipHigh?: number | undefined;
  /** `tv`: |p − p_old|; `kl`: KL of the binary distributions (p_old, 1 − p_old) and (p, 1 − p). */
  readonly divergence?: 'tv' | 'kl' | undefined;
  /** c of min(ρ, c); 20 by default. */
  readonly ratioCap?: number | undefined;
}

/**
 * DPPO: −sg(min(ρ, c)) A log π where the divergence between π_old and π at the sampled token is within δ or A moves
 * them together, else 0 without a gradient. Token means: `clipFraction` (left out), `cappedFraction` (kept, with ρ >
 * c).
 */
export function dppo(settings: DppoSettings): Loss<PolicyColumn> {
  const { clip, clipHigh = clip, divergence = 'tv', ratioCap = 20 } = settings;
  const distanceOf = divergences[divergence];
  const ratio = (t: SurrogateInputs) => logRatio(t, settings).exp();
  const dropped = (t: SurrogateInputs) => {
    const p = t.logprobs.stopGradient().exp();
    const pOld = t.oldLogprobs.exp();
    const distance = distanceOf(p, pOld);
    const up = p.greaterThan(pOld).times(distance.greaterThan(clipHigh));
    const down = p.lessThan(pOld).times(distance.greaterThan(clip));
    return up.where(t.advantages.greaterThan(0), down);
  };
  const surrogate: Surrogate = {
    tokens(t) {
      const weighted = ratio(t).min(ratioCap).stopGradient().times(scoreFunction(t));
      return weighted.where(dropped(t).lessThan(1), 0);
    },
    statistics(t) {
      const left = dropped(t);
      return {
        clipFraction: meanOverTokens(left),
        cappedFraction: meanOverTokens(ratio(t).greaterThan(ratioCap).times(left.lessThan(1))),
      };
    },
  };
  return policyLossOf(surrogate, settings);
}

/** Of the probabilities of the sampled token now (p) and when it was sampled (q); constants. */
const divergences: Record<'tv' | 'kl', (p: TokenArray, q: TokenArray) => TokenArray> = {
  tv: (p, q) => p.minus(q).abs(),
  kl(p, q) {
    const term = (a: TokenArray, b: TokenArray) => a.times(a.log().minus(b.log())).where(a.greaterThan(0), 0);
    return term(q, p).plus(term(q.negate().plus(1), p.negate().plus(1)));
  },
};

export interface DroSettings extends PolicyTermSettings {
  /** β of the quadratic penalty (verl: 0.1). */
  readonly beta: number;
}

/** DRO as verl has it, per token: −A log π + β/2 (log ρ)². */
export const dro = (settings: DroSettings): Loss<PolicyColumn> =>
  policyLossOf(
    {
      tokens: (t) =>
        scoreFunction(t).plus(
          logRatio(t, settings)
            .square()
            .times(settings.beta / 2),
        ),
    },
    settings,
  );
