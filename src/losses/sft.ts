/** Supervised fine-tuning: cross-entropy of the learned tokens. */
import { type Aggregation, aggregate, tokenMean } from './aggregation.js';
import type { Loss } from './loss.js';

/** L = −agg(log π): with the default token mean, the average negative log-likelihood over the whole mini-batch. */
export function crossEntropy(aggregation: Aggregation = tokenMean): Loss<'logprobs'> {
  return {
    couples: 'token',
    reads: ['logprobs'],
    formula: ({ logprobs }) => aggregate(logprobs.negate(), aggregation),
  };
}
