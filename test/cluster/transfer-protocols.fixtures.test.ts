/** Table 3 of HybridFlow: every golden case of what ranks receive, which answer, and what is collected. */
import { expect, it } from 'vitest';
import type { TransferProtocol } from '../../src/cluster/protocols.js';
import { WorkerGroup } from '../../src/cluster/worker-group.js';
import { worldSize } from '../../src/layout/parallel.js';
import { readTopics } from '../rl-fixtures.js';
import { countingWorkers, degrees } from './counting-worker.js';

interface Inputs {
  protocol: TransferProtocol;
  samples: number;
  train: { p: number; t: number; d: number };
  generation?: { p: number; t: number };
}

interface Expected {
  received: number[][];
  collected_from: number[];
  collected: number[] | number[][];
}

const cases = readTopics()
  .filter(({ topic }) => topic === 'transfer_protocols')
  .flatMap((topic) => topic.cases);

it('the fixtures hold cases of every protocol of Table 3', () => {
  const names = ['ONE_TO_ALL', '3D_PROTO', '3D_ALL_MICRO_DP', '3D_PP_ONLY', 'DP_PROTO', 'ALL_TO_ALL'];
  expect(cases.map(({ inputs }) => inputs.protocol)).toEqual(expect.arrayContaining(names));
});

for (const test of cases) {
  it(test.name, async () => {
    const { protocol, samples, train, generation } = test.inputs as unknown as Inputs;
    const expected = test.expected as unknown as Expected;
    const layout = degrees(train.p, train.t, train.d);
    const workers = countingWorkers(worldSize(layout));
    const group = WorkerGroup.create({
      name: 'counting',
      layout,
      ...(generation ? { generation: { pipeline: generation.p, tensor: generation.t } } : {}),
      worker: workers,
      protocols: { echo: protocol as string, who: protocol as string },
    });
    const batch =
      protocol === 'ALL_TO_ALL' ? expected.received : Array.from({ length: samples }, (_, sample) => sample);
    expect(await group.echo(batch)).toEqual(expected.collected);
    expect(workers.map(({ received }) => received[0])).toEqual(expected.received);
    expect(((await group.who(batch)) as unknown[]).flat()).toEqual(expected.collected_from);
    for (const { calls } of workers) expect(calls).toEqual({ echo: 1, who: 1 });
  });
}
