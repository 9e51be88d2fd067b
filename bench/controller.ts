/** The controller's share of a PPO iteration over 4 ranks: the time in which no rank computes or transfers. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { iterations } from './iterations.js';
import { measured, round, spread } from './support.js';

const layouts = { 'tensor 2, data 2': { tensor: 2, data: 2 }, 'data 4': { data: 4 } };

export async function* measure(options: BenchOptions): AsyncGenerator<Measurement> {
  for (const [name, parallel] of Object.entries(layouts)) {
    const timings = await iterations(options, { algorithm: 'ppo', ppo: { miniBatches: 1 }, parallel });
    const shares = timings.map(({ controller }) => controller);
    const seconds = spread(timings.map((timing) => timing.seconds));
    yield measured(`controller, ${name}`, shares, 'share of an iteration', { seconds: round(seconds.median) });
  }
}
