/** Learning rates by step. */
import type { Config } from './schema.js';

export type ScheduleSettings = Pick<Config['optimizer'], 'learningRate' | 'schedule' | 'warmupSteps'>;

/**
 * The learning rate of step n = 1..steps. Warm-up is linear over its steps and reaches the full rate at the last of them;
 * `linear` then falls from the full rate towards 0, which step steps + 1 would have; `cosine` does so along half a wave.
 */
export function learningRateAt(step: number, { learningRate, schedule, warmupSteps }: ScheduleSettings, steps: number) {
  if (step <= warmupSteps) return (learningRate * step) / warmupSteps;
  const progress = (step - 1 - warmupSteps) / (steps - warmupSteps);
  switch (schedule) {
    case 'constant':
      return learningRate;
    case 'linear':
      return learningRate * (1 - progress);
    case 'cosine':
      return learningRate * 0.5 * (1 + Math.cos(Math.PI * progress));
  }
}
