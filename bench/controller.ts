/** The controller's share of a PPO iteration over 4 ranks: the time in which no rank computes or transfers. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { iterations } from './iterations.js';
import { round, spread } from './support.js';

const layouts = { 'tensor 2, data 2': { tensor: 2, data: 2 }, 'data 4': { data: 4 } };

export async function* measure(options: BenchOptions): AsyncGenerator<Measurement> {
  for (const [name, parallel] of Object.entries(layouts)) {
    const timings = await iterations(options, { algorithm: 'ppo', ppo: { miniBatches: 1 }, parallel });
    const share = spread(timings.map(({ controller }) => controller));
    const seconds = spread(timings.map((timing) => timing.seconds));
    yield {
      ...{ name: `controller, ${name}`, value: round(share.median), unit: 'share of an iteration' },
      ...{ min: round(share.min), max: round(share.max), seconds: round(seconds.median) },
    };
  }
}
