/** The critic's loss: squared error to the returns, clipped around the values of the rollout (Schulman et al. 2017). */
import { type Aggregation, aggregate, meanOverTokens, tokenMean } from './aggregation.js';
import type { Loss, LossInputs } from './loss.js';
import type { TokenArray } from './tokens.js';

export interface ValueLossSettings {
  /** ε_v: V may move by this much from the rollout's value before its gradient stops; undefined: no clipping. */
  readonly clip?: number | undefined;
  /** Token mean by default. */
  readonly aggregation?: Aggregation | undefined;
}

type ValueColumn = 'values' | 'oldValues' | 'returns';

/**
 * L = ½ agg( max( (V − R)², (clip(V, V_old − ε_v, V_old + ε_v) − R)² ) ). The derivative with respect to V, before the
 * aggregator's weight, is V − R where the unclipped square is the larger or equal, else 0.
 */
export function valueLoss({ clip, aggregation = tokenMean }: ValueLossSettings): Loss<ValueColumn> {
  return {
    couples: 'sequence',
    reads: ['values', 'oldValues', 'returns'],
    formula(t) {
      const { unclipped, clipped } = squares(t, clip);
      return aggregate(unclipped.max(clipped), aggregation).times(0.5);
    },
    statistics(t) {
      const { unclipped, clipped } = squares(t, clip);
      return { clipFraction: meanOverTokens(clipped.greaterThan(unclipped)) };
    },
  };
}

function squares({ values, oldValues, returns }: LossInputs<ValueColumn>, clip: number | undefined) {
  const error = (v: TokenArray) => v.minus(returns).square();
  const unclipped = error(values);
  return {
    unclipped,
    clipped: clip === undefined ? unclipped : error(values.clip(oldValues.minus(clip), oldValues.plus(clip))),
  };
}
