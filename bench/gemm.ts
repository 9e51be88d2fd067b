/** Matrix products of a Llama's layers as a share of the multiply-add peak, and with cold weights of memory bandwidth. */
import type { BenchOptions, Measurement } from '../src/cli/bench.js';
import type { NativeBench } from '../src/engine/native.js';
import { defaultParts } from '../src/layout/parts.js';
import { createDevice, shapeOf, shareOfCeiling, subject } from './support.js';

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
  const { products, rows, dtypes } = subject();
  const many = rows.at(-1)!;
  const cases: Pick<Gemm, 'product' | 'rows' | 'cold'>[] = [
    { product: 'forward', rows: 1, cold: true },
    ...rows.map((count) => ({ product: 'forward' as const, rows: count, cold: false })),
    { product: 'input', rows: many, cold: false },
    { product: 'weight', rows: many, cold: false },
  ];
  for (const model of products) {
    for (const { name, ...weight } of weightsOf(model)) {
      for (const dtype of dtypes) {
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
