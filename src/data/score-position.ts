/**
 * Which token of a sequence a sequence classifier's score is read at, as transformers does: the rightmost one that is not
 * the padding token (the last when there is no padding token, the first when there is nothing else). Inner padding tokens are not skipped.
 */
export function scorePosition(tokens: ArrayLike<number>, padToken: number | null): number {
  const last = tokens.length - 1;
  if (padToken === null) return last;
  for (let t = last; t >= 0; t--) if (tokens[t] !== padToken) return t;
  return 0;
}
