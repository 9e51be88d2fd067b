/**
 * REINFORCE leave-one-out: the baseline of an answer is the mean score of the other answers to its prompt; the KL penalty is
 * part of the score. Ahmadian et al. 2024, arXiv:2402.14740, eq. 8; Kool et al. 2019.
 */
import type { RolloutAlgorithm } from './algorithm.js';
import { type GrpoSettings, grpo } from './grpo.js';

export type RlooSettings = Omit<GrpoSettings, 'advantage'>;

/** A_i = s_i − (Σ_{j≠i} s_j)/(G − 1), s = r − β Σ_t log(π/π_ref): an iteration of groups with that advantage. */
export const rloo = (settings: RlooSettings): RolloutAlgorithm<'actor' | 'reference' | 'reward'> =>
  grpo({ ...settings, advantage: 'rloo' });
