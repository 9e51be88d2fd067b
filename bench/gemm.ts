/** Matrix products of llama-25m and llama-125m as a share of the multiply-add peak, and with cold weights of memory bandwidth. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { NativeBench } from '../src/engine/native.js';
import { defaultParts } from '../src/layout/parts.js';
import { createDevice, shapeOf, shareOfCeiling } from './support.js';

type Gemm = Extract<NativeBench, { what: 'gemm' }>;

function weightsOf(model: string): { name: string; out: number; in: number; split: 'out' | 'in'; parts: number }[] {
  const s = shapeOf(model);
  const parts = defaultParts(s);
  const queries = s.heads * s.headWidth;
  return [
    { name: 'qkv', out: (s.heads + 2 * s.keyValueHeads) * s.headWidth, in: s.width, split: 'out', parts },
    { name: 'attentionOut', out: s.width, in: queries, split: 'in', parts },
    { name: 'up', out: 2 * s.feedForward, in: s.width, split: 'out', parts },
    { name: 'down', out: s.width, in: s.feedForward, split: 'in', parts },
    { name: 'vocabulary', out: s.vocabulary, in: s.width, split: 'out', parts },
  ];
}

export async function* measure({ threads, runs, signal, note }: BenchOptions): AsyncGenerator<Measurement> {
  await using device = createDevice({ threads });
  for (const model of ['llama-25m', 'llama-125m']) {
    for (const { name, ...weight } of weightsOf(model)) {
      for (const dtype of ['float32', 'bfloat16'] as const) {
        const cases: Pick<Gemm, 'product' | 'rows' | 'cold'>[] = [
          { product: 'forward', rows: 1, cold: true },
          { product: 'forward', rows: 32, cold: false },
          { product: 'forward', rows: 512, cold: false },
          { product: 'forward', rows: 2048, cold: false },
          { product: 'input', rows: 2048, cold: false },
          { product: 'weight', rows: 2048, cold: false },
        ];
        for (const each of cases) {
          signal.throwIfAborted();
          const label = `${model} ${name} ${dtype} ${each.product} M=${each.rows}${each.cold ? ' cold' : ''}`;
          note(label);
          yield await shareOfCeiling(device, label, { what: 'gemm', runs, dtype, ...weight, ...each });
        }
      }
    }
  }
}
