/** A PPO iteration over four models in bfloat16, one mini-batch: its seconds, and those of each phase. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { timedIterations } from './iterations.js';

export const measure = (options: BenchOptions): AsyncGenerator<Measurement> =>
  timedIterations('PPO', options, { algorithm: 'ppo', ppo: { miniBatches: 1 } }, 1);
