/** The soft punishment of overlong answers. DAPO: Yu et al. 2025, arXiv:2503.14476, eq. 13. */
export interface OverlongSettings {
  /** L_max: tokens at which the punishment is full. */
  readonly maxLength: number;
  /** L_cache: over this many tokens before L_max it grows; at least 1. */
  readonly cache: number;
  /** The full punishment; 1 by default. */
  readonly factor?: number | undefined;
  /** true (default): never more than `factor`; false: growing past L_max at the same slope (verl, NeMo-RL, AReaL). */
  readonly capped?: boolean | undefined;
}

/**
 * What is added to the scores of answers of so many tokens, at most 0: 0 up to L_max − L_cache, then
 * factor · (L_max − L_cache − length) / L_cache, and −factor beyond L_max.
 */
export function overlongPenalties(
  lengths: ArrayLike<number>,
  { maxLength, cache, factor = 1, capped = true }: OverlongSettings,
): Float64Array {
  const most = capped ? 1 : Infinity;
  return Float64Array.from(lengths, (length) => {
    const excess = length - (maxLength - cache);
    return excess > 0 ? -factor * Math.min(excess / cache, most) : 0;
  });
}
