/** A PPO iteration over four llama-25m models in bfloat16: 32 sequences of 64 + 128 tokens, one mini-batch. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { timedIterations } from './iterations.js';

export const measure = (options: BenchOptions): AsyncGenerator<Measurement> =>
  timedIterations('PPO', options, { algorithm: 'ppo', ppo: { miniBatches: 1 } }, 1);
