/** `lockstep bench reshard` on a small model: Table 2 holds to the byte, and a count that does not is refused. */
import { expect, test } from 'vitest';
import { engines, type Layout, layoutName, measureLayout, type Row, verify } from '../../bench/reshard.js';
import { createDevice } from '../../src/checkpoints/load-model.js';
import { worldSize } from '../../src/layout/parallel.js';
import { rotary } from '../unit/layout-shapes.js';
import { goldenLayouts, parts } from '../unit/layout-transitions.js';

const shape = rotary({
  ...{ hidden_size: 64, intermediate_size: 512, head_dim: 16, num_key_value_heads: 8, vocab_size: 512 },
  ...{ tie_word_embeddings: true, num_hidden_layers: 12 },
});
const layouts: Layout[] = goldenLayouts(parts).filter(
  ({ train }) => worldSize(train) <= 8 && Number.isInteger(Math.log2(train.data)) && train.tensor > 1,
);

async function rowsOf(layout: Layout): Promise<Row[]> {
  const devices = Array.from({ length: worldSize(layout.train) }, () => createDevice({ threads: 1 }));
  try {
    return await measureLayout({ shape, parts, dtype: 'bfloat16', layout, runs: 1, devices });
  } finally {
    for (const device of devices) await device.close();
  }
}

test('there are golden layouts to measure', () => expect(layouts.length).toBeGreaterThan(2));

test.each(layouts.map((layout) => [layoutName(layout), layout] as const))('%s', async (_, layout) => {
  const rows = await rowsOf(layout);
  expect(rows.map(({ engine }) => engine)).toEqual(engines);
  const [chat, vanilla, flow] = rows as [Row, Row, Row];
  for (const { reports, receive } of rows) {
    for (const { seconds, moveSeconds, checkSeconds, receivedBytes } of reports) {
      expect(receivedBytes).toEqual(receive);
      expect(moveSeconds + checkSeconds).toBeLessThan(seconds * 1.5);
      expect(moveSeconds).toBeGreaterThan(0);
    }
  }
  expect(flow.formula.receiveBytes).toBeLessThanOrEqual(vanilla.formula.receiveBytes);
  expect(vanilla.formula.receiveBytes).toBeLessThanOrEqual(chat.formula.receiveBytes);
  expect(flow.redundant).toEqual(flow.redundant.map(() => 0));
});

test('a byte more or less is refused', async () => {
  const [row] = await rowsOf(layouts[0]!);
  const changed = (key: 'receive' | 'peak' | 'redundant', by: number): Row => {
    const values = [...row![key]];
    values[1]! += by;
    return { ...row!, [key]: values };
  };
  verify(row!);
  expect(() => verify(changed('receive', 1))).toThrow(/rank 1 received .*Table 2 says/);
  expect(() => verify(changed('peak', -1))).toThrow(/rank 1 held at the peak/);
  expect(() => verify(changed('redundant', 1))).toThrow(/rank 1 held besides/);
});
