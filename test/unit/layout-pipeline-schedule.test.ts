import { describe, expect, test } from 'vitest';
import {
  microBatchesInFlight,
  type PipelineSchedule,
  pipelineSchedules,
  type ScheduleName,
  scheduleOfRun,
  simulateSchedule,
} from '../../src/layout/pipeline-schedule.js';
import { stageLayers } from '../../src/layout/stages.js';

const names = Object.keys(pipelineSchedules) as ScheduleName[];
const sizes = [1, 2, 3, 5, 8].flatMap((stages) => [1, 2, 4, 9].map((microBatches) => [stages, microBatches] as const));
const cases = names.flatMap((name) => sizes.map(([stages, microBatches]) => [name, stages, microBatches] as const));

describe('pipeline schedules', () => {
  test.each(cases)('%s, %i stages, %i micro-batches: the laws of a schedule', (name, stages, microBatches) => {
    const schedule = pipelineSchedules[name](stages, microBatches);
    for (const operations of schedule) {
      for (const kind of ['forward', 'backward'] as const) {
        // In order of micro-batch: gradients accumulate in one order under every schedule.
        const order = operations.filter((operation) => operation.kind === kind).map(({ microBatch }) => microBatch);
        expect(order).toEqual(Array.from({ length: microBatches }, (_, i) => i));
      }
      operations.forEach(({ kind, microBatch }, i) => {
        if (kind === 'backward') expect(operations.slice(0, i)).toContainEqual({ kind: 'forward', microBatch });
      });
    }
    const times = simulateSchedule(schedule, { forward: 1, backward: 2 });
    expect(times.makespan).toBe((microBatches + stages - 1) * 3);
    expect(times.bubbleOverIdeal).toBeCloseTo((stages - 1) / microBatches, 12);
    expect(times.bubbleFraction).toBeCloseTo((stages - 1) / (microBatches + stages - 1), 12);
  });

  test.each(sizes)('%i stages, %i micro-batches: 1F1B holds min(p - s, m) micro-batches, GPipe all', (stages, m) => {
    const held = Array.from({ length: stages }, (_, stage) => Math.min(stages - stage, m));
    expect(microBatchesInFlight(pipelineSchedules['1f1b'](stages, m))).toEqual(held);
    expect(microBatchesInFlight(pipelineSchedules.gpipe(stages, m))).toEqual(held.map(() => m));
  });

  test('a run of one stage ends a micro-batch before the next, under every schedule', () => {
    expect(scheduleOfRun('gpipe', 1, 3)).toEqual(pipelineSchedules['1f1b'](1, 3));
    expect(scheduleOfRun('gpipe', 2, 3)).toEqual(pipelineSchedules.gpipe(2, 3));
  });

  test('a schedule that never ends names the stage and what it waits for', () => {
    const stuck: PipelineSchedule = [
      [
        { kind: 'backward', microBatch: 0 },
        { kind: 'forward', microBatch: 0 },
      ],
      [
        { kind: 'forward', microBatch: 0 },
        { kind: 'backward', microBatch: 0 },
      ],
    ];
    expect(() => simulateSchedule(stuck, { forward: 1, backward: 2 })).toThrow(/stage 0 .* backward of micro-batch 0/);
    expect(() => pipelineSchedules.gpipe(0, 1)).toThrow(/0 stages/);
    expect(() => pipelineSchedules['1f1b'](2, 1.5)).toThrow(/1\.5 microBatches/);
  });
});

describe('layers of stages', () => {
  test('layers that do not divide: the stages before the last have one more', () => {
    const sizesOf = (layers: number, stages: number) =>
      stageLayers(layers, stages).map(({ begin, end }) => end - begin);
    expect(sizesOf(5, 2)).toEqual([3, 2]);
    expect(sizesOf(7, 3)).toEqual([2, 3, 2]);
    expect(sizesOf(8, 3)).toEqual([3, 3, 2]);
    expect(sizesOf(6, 4)).toEqual([1, 2, 2, 1]);
  });

  test('stages cover the layers in order, none is empty, and sizes differ by at most one', () => {
    for (let layers = 1; layers <= 12; layers++) {
      for (let stages = 1; stages <= layers; stages++) {
        const ranges = stageLayers(layers, stages);
        expect(ranges.map(({ begin }) => begin)).toEqual([0, ...ranges.slice(0, -1).map(({ end }) => end)]);
        expect(ranges.at(-1)!.end).toBe(layers);
        const counts = ranges.map(({ begin, end }) => end - begin);
        expect(Math.min(...counts)).toBe(Math.floor(layers / stages));
        expect(Math.max(...counts)).toBe(Math.ceil(layers / stages));
        expect(counts.at(-1)).toBe(Math.min(...counts));
      }
    }
  });

  test('more stages than layers are refused', () => {
    expect(() => stageLayers(4, 5)).toThrow(/5 stages .* 4 layers/);
    expect(() => stageLayers(4, 0)).toThrow(expect.objectContaining({ code: 'PARALLEL_INVALID' }));
  });
});
