/**
 * Generalised advantage estimation over packed, ragged sequences.
 * Schulman et al. 2015, arXiv:1506.02438; decoupled and length-adaptive λ: VAPO, arXiv:2504.05118.
 */
import type { Numbers } from './selection.js';

export interface GaeSettings {
  /** γ. */
  readonly gamma: number;
  /** λ of the advantages, and of the returns unless `valueLambda` says otherwise. */
  readonly lambda: number;
  /** λ of the returns (VAPO: 1). */
  readonly valueLambda?: number | undefined;
  /** α of the length-adaptive λ = clip(1 − 1/max(α·length, 1), 0, 1), which then replaces `lambda`. */
  readonly lengthAdaptive?: number | undefined;
}

export interface GaeInputs {
  readonly lengths: Numbers;
  /** Over the packed tokens: not 0 where the policy acted. */
  readonly mask: Numbers;
  readonly rewards: Numbers;
  /** values[t] belongs to the state in which the action of position t was taken. */
  readonly values: Numbers;
  /** Per sequence: the value of the state after its last action; 0 (an ended answer) by default. */
  readonly bootstrap?: Numbers | undefined;
}

/** Packed, 0 where the mask is 0. The returns are those of the unwhitened advantages. */
export interface Advantages {
  readonly advantages: Float64Array;
  readonly returns: Float64Array;
}

/**
 * δ_t = r_t + γ V_next − V_t;  A_t = δ_t + γ λ A_next;  R_t = A_t + V_t, where next is the next position with mask 1 of
 * the same sequence: gaps (tool output) are stepped over, and V and A after the last action are the bootstrap and 0.
 */
export function gae(batch: GaeInputs, settings: GaeSettings): Advantages {
  const { lambda, valueLambda, lengthAdaptive } = settings;
  const advantages = new Float64Array(batch.mask.length);
  const returns = new Float64Array(batch.mask.length);
  for (let b = 0, start = 0; b < batch.lengths.length; start += batch.lengths[b++]!) {
    const actions: number[] = [];
    for (let t = start; t < start + batch.lengths[b]!; t++) if (batch.mask[t]) actions.push(t);
    const after = batch.bootstrap?.[b] ?? 0;
    const policyLambda = lengthAdaptive === undefined ? lambda : adaptiveLambda(lengthAdaptive, actions.length);
    backwards(batch, actions, after, settings.gamma, policyLambda, advantages);
    backwards(batch, actions, after, settings.gamma, valueLambda ?? policyLambda, returns);
    for (const t of actions) returns[t]! += batch.values[t]!;
  }
  return { advantages, returns };
}

/** λ = clip(1 − 1/max(α·length, 1), 0, 1) for a response of `length` learned tokens. */
export const adaptiveLambda = (alpha: number, length: number): number =>
  Math.min(Math.max(1 - 1 / Math.max(alpha * length, 1), 0), 1);

/** The recursion from the last action to the first. */
function backwards(
  { rewards, values }: GaeInputs,
  actions: readonly number[],
  after: number,
  gamma: number,
  lambda: number,
  into: Float64Array,
): void {
  let nextValue = after;
  let nextAdvantage = 0;
  for (let i = actions.length - 1; i >= 0; i--) {
    const t = actions[i]!;
    const delta = rewards[t]! + gamma * nextValue - values[t]!;
    nextAdvantage = delta + gamma * lambda * nextAdvantage;
    nextValue = values[t]!;
    into[t] = nextAdvantage;
  }
}
