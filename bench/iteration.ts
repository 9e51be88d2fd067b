/** A PPO iteration over four llama-25m models and a GRPO iteration over two, in bfloat16: 32 sequences of 64 + 128 tokens. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import { iterations } from './iterations.js';
import { round, spread } from './support.js';

const works = {
  PPO: { settings: { algorithm: 'ppo', ppo: { miniBatches: 1 } }, samples: 1 },
  GRPO: { settings: { algorithm: 'grpo' }, samples: 4 },
};

export async function* measure(options: BenchOptions): AsyncGenerator<Measurement> {
  for (const [name, { settings, samples }] of Object.entries(works)) {
    const timings = await iterations(options, settings, { samples });
    const of = spread(timings.map(({ seconds }) => seconds));
    yield { name: `${name} iteration`, value: round(of.median), unit: 's', min: round(of.min), max: round(of.max) };
    const share = spread(timings.map(({ outside }) => outside));
    yield {
      ...{ name: `${name}: outside native calls`, value: round(share.median), unit: 'share of an iteration' },
      ...{ min: round(share.min), max: round(share.max) },
    };
  }
}
