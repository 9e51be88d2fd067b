/** Controllers of β, the weight of the KL penalty. Adaptive: Ziegler et al. 2019, arXiv:1909.08593, section 2.2. */
import { LockstepError } from '../errors.js';

/** What a checkpoint keeps of a controller. */
export interface KlControllerState {
  readonly coefficient: number;
}

export interface KlController {
  /** β for the next rollout. */
  readonly coefficient: number;
  /** Learns the mean KL of a rollout of so many sequences. */
  update(kl: number, sequences: number): void;
  state(): KlControllerState;
  /** Continues from a saved state. Throws `CHECKPOINT_CONTROLLER` when it holds no finite coefficient. */
  restore(state: KlControllerState): void;
}

export interface AdaptiveKlSettings {
  readonly coefficient: number;
  /** The KL to steer to, in the unit that `update` is given. */
  readonly target: number;
  /** Sequences over which an error of 1 would double β. */
  readonly horizon: number;
}

/** β stays what it is. */
export const fixedKl = (coefficient: number): KlController => controller(coefficient, (beta) => beta);

/** e = clip(KL / target − 1, ±0.2);  β ← β (1 + e n / horizon). */
export const adaptiveKl = ({ coefficient, target, horizon }: AdaptiveKlSettings): KlController =>
  controller(coefficient, (beta, kl, sequences) => {
    const error = Math.min(Math.max(kl / target - 1, -0.2), 0.2);
    return beta * (1 + (error * sequences) / horizon);
  });

function controller(initial: number, next: (beta: number, kl: number, sequences: number) => number): KlController {
  let beta = initial;
  return {
    get coefficient() {
      return beta;
    },
    update(kl, sequences) {
      beta = next(beta, kl, sequences);
    },
    state: () => ({ coefficient: beta }),
    restore({ coefficient }) {
      if (!Number.isFinite(coefficient)) {
        throw new LockstepError(
          'CHECKPOINT_CONTROLLER',
          `The saved KL controller has the coefficient ${coefficient}; a finite number is needed. Use an older checkpoint.`,
          { coefficient },
        );
      }
      beta = coefficient;
    },
  };
}
