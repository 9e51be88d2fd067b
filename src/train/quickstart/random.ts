/** Random numbers of the quickstart: streams that are functions of (seed, name), the same on every machine. */
import { philox } from '../../data/sampler.js';

/** The next number in [0, 1). */
export type Random = () => number;

/** A stream of its own for every name. */
export function randomStream(seed: number, name: string): Random {
  const key: [number, number] = [seed >>> 0, Math.floor(seed / 2 ** 32) >>> 0];
  const [high, low] = hash(name);
  let block: number[] = [];
  let drawn = 0;
  return () => {
    if (drawn % 4 === 0) block = philox(key, [(drawn / 4) >>> 0, Math.floor(drawn / 2 ** 34), high, low]);
    return block[drawn++ % 4]! / 2 ** 32;
  };
}

export function pick<T>(items: readonly T[], random: Random): T {
  return items[Math.floor(random() * items.length)]!;
}

/** The items in a random order (Fisher-Yates). */
export function shuffled<T>(items: readonly T[], random: Random): T[] {
  const result = [...items];
  for (let i = result.length - 1; i > 0; i--) {
    const j = Math.floor(random() * (i + 1));
    [result[i], result[j]] = [result[j]!, result[i]!];
  }
  return result;
}

/** Two words of a name: FNV-1a from two offsets. */
function hash(name: string): [number, number] {
  const from = (offset: number) =>
    [...name].reduce((state, letter) => Math.imul(state ^ letter.charCodeAt(0), 0x01000193), offset) >>> 0;
  return [from(0x811c9dc5), from(0x9e3779b9)];
}
