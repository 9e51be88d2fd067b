/** A GRPO iteration over two llama-25m models in bfloat16: 8 prompts, 4 answers each, of 64 + 128 tokens, one mini-batch. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { timedIterations } from './iterations.js';

export const measure = (options: BenchOptions): AsyncGenerator<Measurement> =>
  timedIterations('GRPO', options, { algorithm: 'grpo' }, 4);
