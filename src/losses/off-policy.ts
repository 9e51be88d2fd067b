/** How far the policy that sampled is from the policy that is trained from: KL, perplexities, χ² divergences. */
import { perCount } from './aggregation.js';
import { klEstimate } from './kl.js';
import type { CorrectionInputs } from './rollout-correction.js';
import { select } from './selection.js';
import { type SequenceArray, TokenArray } from './tokens.js';

export interface OffPolicySettings {
  /** Clamps log ratios, and their sums over sequences, to ± this in the χ² divergences. Off by default (verl: 20). */
  readonly logRatioBound?: number | undefined;
  /**
   * Sequences that means are over: those with a learned token (default), or all, an empty one having log-probs of 0.
   */
  readonly sequences?: 'non-empty' | 'all' | undefined;
}

/** With r = π_old / π_rollout; nats. Sequence means of perplexities are of each sequence's own. */
export interface OffPolicyMetrics {
  /** KL(π_rollout‖π_old) over tokens by k1 and by k3. */
  readonly kl: number;
  readonly k3: number;
  /** exp(−mean log π) of a sequence, by the trainer and by the rollout, and mean(−mean log π). */
  readonly trainingPerplexity: number;
  readonly rolloutPerplexity: number;
  readonly trainingLogPerplexity: number;
  readonly rolloutLogPerplexity: number;
  /** Trainer's log-perplexity of a sequence less the rollout's: mean, mean of the absolute, mean of the exponential. */
  readonly logPerplexityDifference: number;
  readonly absoluteLogPerplexityDifference: number;
  readonly perplexityRatio: number;
  /** mean r² − 1 over tokens, and over sequences with r the product of their tokens'. */
  readonly chiSquareToken: number;
  readonly chiSquareSequence: number;
}

/** Over the learned tokens of a whole rollout; 0 where there are none. */
export function offPolicyMetrics(batch: CorrectionInputs, settings: OffPolicySettings = {}): OffPolicyMetrics {
  const { logRatioBound: bound = Infinity, sequences = 'non-empty' } = settings;
  const selection = select(batch.lengths, batch.mask);
  const { totals, starts } = selection;
  const old = TokenArray.constant(selection, batch.oldLogprobs);
  const rollout = TokenArray.constant(selection, batch.rolloutLogprobs);
  const logRatio = old.minus(rollout);
  const overTokens = (x: TokenArray) => perCount(x.sum(), totals.tokens).value;
  const counted = Int32Array.from(starts.subarray(1).keys()).filter(
    (b) => sequences === 'all' || starts[b + 1]! > starts[b]!,
  );
  const overSequences = (x: SequenceArray) => perCount(x.gather(counted).sum(), counted.length).value;
  const training = old.meanBySequence().negate();
  const sampling = rollout.meanBySequence().negate();
  const difference = training.minus(sampling);
  return {
    kl: overTokens(logRatio.negate()),
    k3: overTokens(klEstimate(rollout, old, 'k3')),
    trainingPerplexity: overSequences(training.exp()),
    rolloutPerplexity: overSequences(sampling.exp()),
    trainingLogPerplexity: overSequences(training),
    rolloutLogPerplexity: overSequences(sampling),
    logPerplexityDifference: overSequences(difference),
    absoluteLogPerplexityDifference: overSequences(difference.abs()),
    perplexityRatio: overSequences(difference.exp()),
    chiSquareToken: overTokens(logRatio.clip(-bound, bound).exp().square().minus(1)),
    chiSquareSequence: overSequences(logRatio.sumBySequence().clip(-bound, bound).exp().square().minus(1)),
  };
}
