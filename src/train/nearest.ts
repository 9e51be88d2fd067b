/** The nearest of known names to one that is not known. */

/** The candidate at the smallest edit distance, if that is at most half of the longer word. */
export function nearest(
  word: string,
  candidates: readonly string[],
  by = (name: string): string => name,
): string | undefined {
  let best: string | undefined;
  let bestDistance = Number.POSITIVE_INFINITY;
  for (const candidate of candidates) {
    const name = by(candidate);
    const distance = editDistance(word.toLowerCase(), name.toLowerCase());
    const limit = Math.max(word.length, name.length) / 2;
    if (distance <= limit && distance < bestDistance) [best, bestDistance] = [candidate, distance];
  }
  return best;
}

/** Levenshtein distance. */
export function editDistance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + Number(a[i - 1] !== b[j - 1]));
    }
    row = next;
  }
  return row[b.length]!;
}
