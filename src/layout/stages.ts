/** Which layers a pipeline stage holds. */
import { LockstepError } from '../errors.js';

/** Layers, parts, rows or columns begin .. end - 1. */
export interface Range {
  begin: number;
  end: number;
}

/**
 * Layers of each stage, in order: floor(L / p) each, and one more for the L mod p stages just before the last. The last
 * stage has the head's product with the vocabulary to do, and the earlier a stage, the more micro-batches 1F1B keeps in
 * flight on it (the first has the embedding besides), so the extra layers lie between.
 * @throws PARALLEL_INVALID when a stage would have no layer
 */
export function stageLayers(layers: number, stages: number): Range[] {
  if (!Number.isSafeInteger(stages) || stages < 1 || stages > layers) {
    const message =
      `parallel.pipeline: ${stages} stages are not possible for ${layers} layers: it must be an integer from 1 to ` +
      `${layers}, so that every stage has a layer.`;
    throw new LockstepError('PARALLEL_INVALID', message, { key: 'parallel.pipeline', received: stages, layers });
  }
  const extra = layers % stages;
  const ranges: Range[] = [];
  let begin = 0;
  for (let stage = 0; stage < stages; stage++) {
    const more = stage < stages - 1 && stage >= stages - 1 - extra ? 1 : 0;
    const end = begin + Math.floor(layers / stages) + more;
    ranges.push({ begin, end });
    begin = end;
  }
  return ranges;
}
