/**
 * The run's canary: the trainer's log-probs of sampled tokens must equal the rollout's to the last bit, since both come
 * from the same kernels and weights. The first difference stops the run.
 */
import type { TokenBatch } from '../data/batch.js';
import { LockstepError } from '../errors.js';
import { offsets } from './batches.js';

/** What a canary needs of a rollout: over the packed tokens, log-probs of the sampled ones and a mask that is not 0 there. */
export interface SampledTokens extends TokenBatch {
  readonly logprobs: ArrayLike<number>;
  readonly responseMask: ArrayLike<number>;
}

export interface CanaryReport {
  /** Largest |trainer - rollout|; 0, or the run has stopped. */
  max: number;
  tokens: number;
}

export class Canary {
  readonly #rollout: SampledTokens;
  readonly #starts: Int32Array;
  readonly #seen = new Set<number>();
  #tokens = 0;

  constructor(rollout: SampledTokens) {
    this.#rollout = rollout;
    this.#starts = offsets(rollout.lengths);
  }

  /**
   * Compares the trainer's log-probs of a batch that holds the given rows of the rollout.
   *
   * @throws LockstepError MISMATCH at the first token that differs, with both values.
   */
  compare(batch: TokenBatch, rows: ArrayLike<number>, logprobs: ArrayLike<number>): void {
    let at = 0;
    for (let i = 0; i < rows.length; i++) {
      const row = rows[i]!;
      const start = this.#starts[row]!;
      for (let t = 0; t < batch.lengths[i]!; t++, at++) {
        if (!this.#rollout.responseMask[start + t]) continue;
        if (!this.#seen.has(row)) this.#tokens++;
        if (!Object.is(logprobs[at], this.#rollout.logprobs[start + t])) {
          throw mismatch(row, t + 1, batch.tokens[at + 1]!, logprobs[at]!, this.#rollout.logprobs[start + t]!);
        }
      }
      this.#seen.add(row);
    }
  }

  report(): CanaryReport {
    return { max: 0, tokens: this.#tokens };
  }
}

function mismatch(sequence: number, position: number, token: number, trainer: number, rollout: number): LockstepError {
  return new LockstepError(
    'MISMATCH',
    `the trainer's log-prob of sequence ${sequence}, position ${position}, token ${token} is ${trainer}, but the rollout's was ${rollout} ` +
      `(difference ${Math.abs(trainer - rollout)}): generation and training do not compute the same function. The run stops rather than learn ` +
      'from it; please report it with `lockstep doctor`',
    { sequence, position, token, trainer, rollout },
  );
}
