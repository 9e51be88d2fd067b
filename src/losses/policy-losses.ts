/**
 * The policy losses by name. Each takes its own settings and those of `PolicyTermSettings`; papers are with the
 * functions.
 */
import type { Loss } from './loss.js';
import { type PolicyColumn, policyLoss } from './policy.js';
import { clipCov, klCov } from './policy-covariance.js';
import { gmpo, gspo, rloo } from './policy-sequence.js';
import { cispo, dppo, dro, gpg, reinforce, sapo } from './policy-token.js';
import { bypassReinforce } from './rollout-correction.js';

/** Settings to loss, by name; the formulas are in docs/papers.md. */
export const policyLosses = {
  ppo: policyLoss,
  gspo,
  gmpo,
  rloo,
  cispo,
  sapo,
  reinforce,
  gpg,
  dppo,
  dro,
  'clip-cov': clipCov,
  'kl-cov': klCov,
  'bypass-reinforce': bypassReinforce,
} satisfies Record<string, (settings: never) => Loss<PolicyColumn>>;

export type PolicyLossName = keyof typeof policyLosses;
