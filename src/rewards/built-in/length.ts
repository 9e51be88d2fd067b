/**
 * Length shaping, from 0 down to −1, linear in the number of response tokens (the end token counts):
 * - `max`, `buffer`: the soft overlong punishment of DAPO [2503.14476], eq. 13. 0 up to max − buffer tokens, −1 from max on.
 * - `target`, `width`: −|tokens − target| / width, the distance of LCPO-Exact (L1 [2503.04697], eq. 1, with α = 1/width), no less
 *   than −1.
 */
import type { RewardFunction } from '../reward-function.js';
import { each } from './samples.js';

export type LengthSettings =
  | { readonly max: number; readonly buffer: number }
  | { readonly target: number; readonly width: number };

export function length(settings: LengthSettings): RewardFunction {
  const penalty = 'max' in settings ? overlong(settings) : distance(settings);
  return each(({ tokens }) => -Math.min(1, Math.max(0, penalty(tokens.length))) || 0);
}

const overlong =
  ({ max, buffer }: { max: number; buffer: number }) =>
  (tokens: number) =>
    (tokens - (max - buffer)) / buffer;

const distance =
  ({ target, width }: { target: number; width: number }) =>
  (tokens: number) =>
    Math.abs(tokens - target) / width;
