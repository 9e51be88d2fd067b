/** What checks of golden cases of policy losses share: inputs of a case, aggregation modes, gradients. */
import type { Aggregation, AggregationMode } from '../../src/losses/aggregation.js';
import { evaluateLoss, type Loss, type LossBatch, type LossResult, type Outputs } from '../../src/losses/loss.js';
import { Batch, type Case, expectClose, gradientsOf, type Json, number, type Topic } from '../rl-fixtures.js';

/** verl's bound on log ratios, which the expected numbers have. */
export const verlLogRatioBound = 20;

export type Check = (test: Case, inputs: Record<string, Json>, poisoned: boolean) => void;

/** A check of each case as it is and with NaN in its masked inputs. */
export const twice =
  (check: Check) =>
  (test: Case, topic: Topic): void => {
    for (const poisoned of [false, true]) check(test, inputsOf(topic, test), poisoned);
  };

/** The inputs of a case with those of the batch that it names. */
export function inputsOf({ batches }: Topic, { inputs }: Case): Record<string, Json> {
  if (typeof inputs.batch !== 'string') return inputs;
  const batch = batches![inputs.batch]!;
  const advantages = typeof inputs.advantages === 'string' ? { advantages: batch[inputs.advantages]! } : {};
  return { ...batch, ...inputs, ...advantages };
}

export function policyInputs(inputs: Record<string, Json>, poisoned: boolean): { batch: LossBatch; outputs: Outputs } {
  const batch = new Batch(inputs, poisoned);
  const columns = { oldLogprobs: batch.tokens('old_log_probs'), advantages: batch.broadcast('advantages') };
  return {
    batch: { lengths: batch.lengths, mask: batch.mask, columns },
    outputs: { logprobs: batch.tokens('log_probs'), entropies: batch.mask.map(() => 0) },
  };
}

/** `mean` is over all sequences, an empty one counting as 0. */
export const aggregationOf = (mode: string, horizon?: Json): Aggregation =>
  mode === 'mean'
    ? { mode: 'seq-mean-token-mean', sequences: 'all' }
    : { mode: mode as AggregationMode, horizon: horizon === undefined ? undefined : number(horizon) };

/** The loss of every aggregation mode that a case names, and the gradients it gives. */
export function checkModes(test: Case, horizon: Json | undefined, evaluate: (mode: Aggregation) => LossResult): void {
  for (const [mode, value] of Object.entries(test.expected.loss as Record<string, Json>)) {
    expectClose(evaluate(aggregationOf(mode, horizon)).loss, value);
  }
  for (const { of, values } of gradientsOf(test)) {
    expectClose(evaluate(aggregationOf(of, horizon)).gradients.logprobs!, values);
  }
}

/**
 * Each token's loss before the aggregation, packed: the sum of all losses under weights that are 1 at that token alone.
 */
export function tokenLosses(
  lossOf: (settings: { aggregation: Aggregation; weighted: true }) => Loss,
  batch: LossBatch,
  outputs: Outputs,
): number[] {
  const loss = lossOf({ aggregation: { mode: 'token-sum' }, weighted: true });
  return Array.from({ length: batch.mask.length }, (_, t) => {
    const weights = Array.from({ length: batch.mask.length }, (__, i) => (i === t ? 1 : 0));
    return evaluateLoss(loss, { ...batch, columns: { ...batch.columns, weights } }, outputs).loss;
  });
}
