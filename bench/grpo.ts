/** A GRPO iteration over two models in bfloat16, 4 answers to each prompt, one mini-batch: its seconds, and those of each phase. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { timedIterations } from './iterations.js';

export const measure = (options: BenchOptions): AsyncGenerator<Measurement> =>
  timedIterations('GRPO', options, { algorithm: 'grpo' }, 4);
