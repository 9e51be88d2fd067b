/** The reference policy q of a KL term β KL(π‖q). Without the term (β = 0) a run has no reference. */
import type { Awaitable, ReferenceWorker, Rollout } from './algorithm.js';

export const referenceOf = (beta: number): readonly 'reference'[] => (beta > 0 ? ['reference'] : []);

/** log q of a rollout; without a reference its own log-probs, whose KL is 0. */
export const anchorOf = async (
  reference: ReferenceWorker,
  rollout: Awaitable<Rollout>,
  beta: number,
): Promise<Float32Array> => (beta > 0 ? reference.computeLogprobs(rollout) : (await rollout).logprobs);
