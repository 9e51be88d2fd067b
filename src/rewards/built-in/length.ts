/**
 * Length shaping, from 0 down to −1, linear in the number of response tokens (the end token counts):
 * - `max`, `buffer`: the soft overlong punishment of DAPO [2503.14476], eq. 13. 0 up to max − buffer tokens, −1 from max on.
 * - `target`, `width`: −|tokens − target| / width, the distance of LCPO-Exact (L1 [2503.04697], eq. 1, with α = 1/width), no less
 *   than −1.
 */
import { overlongPenalties } from '../../data/overlong.js';
import type { RewardFunction, RewardSample } from '../reward-function.js';
import { each } from './samples.js';

export type LengthSettings =
  | { readonly max: number; readonly buffer: number }
  | { readonly target: number; readonly width: number };

export function length(settings: LengthSettings): RewardFunction {
  return 'max' in settings ? overlong(settings) : each(distance(settings));
}

const overlong =
  ({ max, buffer }: { max: number; buffer: number }): RewardFunction =>
  (samples) => {
    const lengths = samples.map(({ tokens }) => tokens.length);
    return Array.from(overlongPenalties(lengths, { maxLength: max, cache: buffer }));
  };

const distance =
  ({ target, width }: { target: number; width: number }) =>
  ({ tokens }: RewardSample) =>
    -Math.min(1, Math.abs(tokens.length - target) / width) || 0;
