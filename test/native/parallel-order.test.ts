/**
 * The order in which ranks really work, from what their devices tell of it: each stage runs its schedule's operations in its
 * order, one after the other, and none before what it needs is done.
 */
import { describe, expect, test } from 'vitest';
import { checkpointTensors } from '../../src/checkpoints/hugging-face.js';
import { createDevice } from '../../src/checkpoints/load-model.js';
import { packBatch } from '../../src/data/batch.js';
import type { Device, Work } from '../../src/engine/device.js';
import { ParallelEngine } from '../../src/engine/parallel-engine.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { pipelineSchedules, type ScheduleName } from '../../src/layout/pipeline-schedule.js';
import { randomModel, sequencesOf, tinyShape } from './support.js';

const shape: ModelShape = { ...tinyShape, layers: 4, windows: [0, 24, 0, 24] };
const model = randomModel('four layers', shape);
/** Lengths of the micro-batches, in turn: some cost far more than others. */
const lengths = [[40, 9], [3], [64, 64, 64], [17]];

/** What each rank did, in the order in which its device told of it. */
async function workOf(
  degrees: { pipeline: number; tensor: number; data: number },
  microBatches: number,
  schedule: ScheduleName,
): Promise<Work[][]> {
  const world = degrees.pipeline * degrees.tensor * degrees.data;
  const works: Work[][] = Array.from({ length: world }, () => []);
  const own = createDevice({ threads: 1 });
  const devices: Device[] = works.map((list) => createDevice({ threads: 1, onWork: (work) => list.push(work) }));
  try {
    const one = await model.open({ device: own, dtype: 'float32', parts: 4 });
    const engine = await ParallelEngine.create({
      ...{ shape, devices, degrees, dtype: 'float32', parts: 4, train: true, schedule },
    });
    for (const { name } of checkpointTensors(one)) await engine.writeTensor(name, await one.readTensor(name));
    await engine.publish();
    for (const list of works) list.length = 0;
    const batches = Array.from({ length: degrees.data }, () =>
      Array.from({ length: microBatches }, (_, i) => packBatch(sequencesOf(shape, lengths[i % lengths.length]!, i))),
    );
    await engine.accumulate(batches, { outputs: ['logprobs'] }, ({ logprobs }) => ({ logprobs: logprobs!.fill(-1) }));
    return works;
  } finally {
    for (const device of [own, ...devices]) await device.close();
  }
}

const cases = (['gpipe', '1f1b'] as const).flatMap((schedule) =>
  [
    { pipeline: 2, tensor: 1, data: 1 },
    { pipeline: 4, tensor: 1, data: 1 },
    { pipeline: 2, tensor: 2, data: 1 },
    { pipeline: 2, tensor: 2, data: 2 },
  ].flatMap((degrees) => [1, 2, 7].map((microBatches) => ({ schedule, ...degrees, microBatches }))),
);

describe.each(cases)('$schedule p$pipeline t$tensor d$data, $microBatches micro-batches', (layout) => {
  const { schedule, pipeline, tensor, data, microBatches } = layout;
  test('the order of work is that of the schedule', async () => {
    const works = await workOf({ pipeline, tensor, data }, microBatches, schedule);
    const expected = pipelineSchedules[schedule](pipeline, microBatches);
    for (const [rank, list] of works.entries()) {
      const stage = Math.floor(rank / tensor) % pipeline;
      const order = list.map(({ operation, microBatch }) => ({ kind: operation, microBatch }));
      expect(order, `rank ${rank}`).toEqual(expected[stage]);
      for (const [i, work] of list.entries()) {
        const { operation, microBatch, begin, end, communicating, waiting } = work;
        const what = `rank ${rank}, ${operation} ${microBatch}`;
        expect(end, what).toBeGreaterThan(begin);
        expect(waiting, what).toBeLessThanOrEqual(communicating);
        expect(communicating, what).toBeLessThan(end - begin);
        expect(communicating > 0, `${what} adds up over the stage`).toBe(tensor > 1);
        if (i > 0) expect(begin, `${what} after the one before`).toBeGreaterThanOrEqual(list[i - 1]!.end);
        const on = (other: number, kind: Work['operation']): Work =>
          works[other]!.find((w) => w.operation === kind && w.microBatch === microBatch)!;
        const needed =
          operation === 'forward'
            ? stage > 0 && on(rank - tensor, 'forward')
            : stage < pipeline - 1
              ? on(rank + tensor, 'backward')
              : on(rank, 'forward');
        if (needed) expect(begin, `${what} after what it needs`).toBeGreaterThanOrEqual(needed.end);
        // Ranks of a stage add up what they have: none has done before all have begun.
        const first = rank - (rank % tensor);
        for (let other = first; other < first + tensor; other++) {
          expect(end, `${what} together with rank ${other}`).toBeGreaterThan(on(other, operation).begin);
        }
      }
    }
  });
});
