/** Statistics over the learned tokens of a whole rollout: two passes in double precision, in packed order. */
import type { Numbers } from './selection.js';

/** Divisor of the variance: n − 1 (Bessel) or n. */
export type VarianceKind = 'bessel' | 'population';

export interface Moments {
  readonly count: number;
  /** 0 when there is nothing to average. */
  readonly mean: number;
  /** 0 for fewer than two numbers. */
  readonly variance: number;
}

/** 0 for nothing to average. */
export function mean(x: Numbers): number {
  let sum = 0;
  for (let i = 0; i < x.length; i++) sum += x[i]!;
  return x.length > 0 ? sum / x.length : 0;
}

/** Mean and variance of the entries whose mask is not 0 (all of them without a mask). */
export function moments(x: Numbers, mask?: Numbers, kind: VarianceKind = 'bessel'): Moments {
  let count = 0;
  let sum = 0;
  for (let i = 0; i < x.length; i++) {
    if (mask && !mask[i]) continue;
    count++;
    sum += x[i]!;
  }
  const mean = count > 0 ? sum / count : 0;
  let squares = 0;
  for (let i = 0; i < x.length; i++) if (!mask || mask[i]) squares += (x[i]! - mean) ** 2;
  return { count, mean, variance: count > 1 ? squares / (kind === 'bessel' ? count - 1 : count) : 0 };
}

export interface WhiteningSettings {
  readonly variance?: VarianceKind | undefined;
  /** true (default): mean 0; false: the mean is put back (used for rewards). */
  readonly shiftMean?: boolean | undefined;
  /** A single number has no variance: `keep` it (default) or treat it by the formula, which gives 0 (plus the mean). */
  readonly single?: 'keep' | 'formula' | undefined;
}

/**
 * (x − μ) · (σ² + 1e-8)^−½ over all entries whose mask is not 0, which is to be the whole rollout batch; 0 elsewhere.
 * PPO's advantage normalisation (Andrychowicz et al. 2020, arXiv:2006.05990) with the batch of Xiaohongshu's framework.
 */
export function whiten(x: Numbers, mask: Numbers, settings: WhiteningSettings = {}): Float64Array {
  const { variance: kind = 'bessel', shiftMean = true, single = 'keep' } = settings;
  const { count, mean, variance } = moments(x, mask, kind);
  const scale = 1 / Math.sqrt(variance + 1e-8);
  const offset = shiftMean ? 0 : mean;
  const kept = count === 1 && single === 'keep';
  return Float64Array.from({ length: x.length }, (_, i) => {
    if (!mask[i]) return 0;
    return kept ? x[i]! : (x[i]! - mean) * scale + offset;
  });
}

export interface ExplainedVarianceSettings {
  readonly variance?: VarianceKind | undefined;
  /** Added to var(R); 0 makes constant returns NaN. */
  readonly epsilon?: number | undefined;
}

/** 1 − var(R − V) / (var(R) + ε), ε 1e-5: 1 for a perfect critic, 0 for a constant one; 0 for fewer than two tokens. */
export function explainedVariance(
  values: Numbers,
  returns: Numbers,
  mask: Numbers,
  { variance: kind = 'bessel', epsilon = 1e-5 }: ExplainedVarianceSettings = {},
): number {
  const residuals = Float64Array.from({ length: returns.length }, (_, i) => returns[i]! - values[i]!);
  const total = moments(returns, mask, kind);
  if (total.count < 2) return 0;
  const scale = total.variance + epsilon;
  return scale > 0 ? 1 - moments(residuals, mask, kind).variance / scale : Number.NaN;
}

/**
 * (s − μ) / σ with μ and σ of reference scores: a reward model shifted to mean 0 and variance 1 on reference data before
 * use (Huang et al. 2024, arXiv:2403.17031). Population variance by default; σ = 0 divides by 1.
 */
export function normaliseScores(
  scores: Numbers,
  referenceScores: Numbers,
  variance: VarianceKind = 'population',
): Float64Array {
  const reference = moments(referenceScores, undefined, variance);
  const deviation = Math.sqrt(reference.variance) || 1;
  return Float64Array.from(scores, (score) => (score - reference.mean) / deviation);
}
