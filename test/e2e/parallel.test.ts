/** `score` and `generate` over ranks print what one rank prints, to the byte. */
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { lockstep, smallModel, temporary, writeRows } from './train-process.js';

const rows = [40, 3, 17].map((length, row) => ({
  tokens: Array.from({ length }, (_, i) => 3 + ((i * 31 + row * 7) % 300)),
}));

describe.each(['float32', 'bfloat16'])('two stages of two ranks, %s', (dtype) => {
  test.each([
    ['score', ['--temperature', '0.8']],
    ['generate', ['--max-new-tokens', '12', '--samples', '2', '--seed', '5', '--ignore-eos']],
  ])('%s', async (command, flags) => {
    const file = await writeRows(join(await temporary(), 'rows.jsonl'), rows);
    const run = (...ranks: string[]) =>
      lockstep([command, smallModel, '--input', file, '--json', '--parts', '4', '--dtype', dtype, ...flags, ...ranks]);
    const [one, four] = [await run(), await run('--tensor', '2', '--pipeline', '2')];
    expect(four).toEqual({ code: 0, signal: null, stdout: one.stdout, stderr: one.stderr });
    expect(one.stdout.trim().split('\n')).toHaveLength(command === 'score' ? 3 : 6);
  });
});

test.each([
  [['--parts', '4', '--tensor', '8'], '--tensor: 8 is not possible with --parts 4'],
  [['--parts', '4', '--tensor', '3'], '--tensor: 3 is not possible with --parts 4'],
  [['--pipeline', '99'], '--pipeline: 99 stages are not possible for 2 layers'],
  [['--parts', '3'], '--parts: 3 is not possible for this model'],
  [['--tensor', '0'], '--tensor: expected a whole number >= 1, received 0'],
])('what the model does not allow is refused with the flag and the reason: %s', async (flags, reason) => {
  const file = await writeRows(join(await temporary(), 'rows.jsonl'), rows);
  const { code, stdout, stderr } = await lockstep(['score', smallModel, '--input', file, ...flags]);
  expect([code, stdout]).toEqual([2, '']);
  expect(stderr).toContain(`error USAGE_VALUE: ${reason}`);
});
