/**
 * Pipeline schedules as data: the order in which each stage runs the forward and backward of its micro-batches, and what that
 * order costs. GPipe [1811.06965]; 1F1B with a flush, not interleaved [2104.04473, section 2.2].
 */
import { LockstepError } from '../errors.js';

export interface PipelineOperation {
  kind: 'forward' | 'backward';
  microBatch: number;
}

/** Operations of each stage, in order. */
export type PipelineSchedule = readonly (readonly PipelineOperation[])[];

/** Time of one micro-batch on one stage, in any unit. */
export interface OperationTimes {
  forward: number;
  backward: number;
}

export interface ScheduleTimes {
  /** When operation k of stage s begins if each begins as soon as it can. */
  start: number[][];
  makespan: number;
  /** Idle time over all stages / (stages x makespan). */
  bubbleFraction: number;
  /** Idle time of a stage / its busy time: (p - 1) / m for both schedules. */
  bubbleOverIdeal: number;
}

const forward = (microBatch: number): PipelineOperation => ({ kind: 'forward', microBatch });
const backward = (microBatch: number): PipelineOperation => ({ kind: 'backward', microBatch });
const count = (length: number): number[] => Array.from({ length }, (_, i) => i);

function checkCounts(stages: number, microBatches: number): void {
  for (const [name, value] of Object.entries({ stages, microBatches })) {
    if (Number.isSafeInteger(value) && value >= 1) continue;
    const message = `A pipeline schedule cannot have ${value} ${name}: it needs an integer, at least 1.`;
    throw new LockstepError('SCHEDULE_INVALID', message, { name, received: value });
  }
}

/** All forwards, then all backwards, both in order of micro-batch. A stage holds all m micro-batches at once. */
function gpipe(stages: number, microBatches: number): PipelineOperation[][] {
  checkCounts(stages, microBatches);
  return count(stages).map(() => [...count(microBatches).map(forward), ...count(microBatches).map(backward)]);
}

/**
 * Stage s runs min(p - 1 - s, m) forwards to warm up, then one forward and one backward in turn, then the backwards that are
 * left. It holds at most min(p - s, m) micro-batches at once; the makespan is GPipe's.
 */
function oneForwardOneBackward(stages: number, microBatches: number): PipelineOperation[][] {
  checkCounts(stages, microBatches);
  return count(stages).map((stage) => {
    const warmUp = Math.min(stages - 1 - stage, microBatches);
    const steady = count(microBatches - warmUp).flatMap((i) => [forward(warmUp + i), backward(i)]);
    return [...count(warmUp).map(forward), ...steady, ...count(warmUp).map((i) => backward(microBatches - warmUp + i))];
  });
}

/** Schedules by name: (stages, microBatches) to the operations of each stage. */
export const pipelineSchedules = { gpipe, '1f1b': oneForwardOneBackward };

export type ScheduleName = keyof typeof pipelineSchedules;

/** What a run does: a stage that is alone waits for no other, and ends each micro-batch before the next begins, whatever the name. */
export const scheduleOfRun = (name: ScheduleName, stages: number, microBatches: number): PipelineSchedule =>
  pipelineSchedules[stages === 1 ? '1f1b' : name](stages, microBatches);

/**
 * Start times when transfers take none, of equal operations or of such as `times` says of each. A forward waits for the same forward on the stage before, a backward for the same
 * backward on the stage after, on the last stage for its forward.
 * @throws SCHEDULE_INVALID when an operation waits for ever
 */
export function simulateSchedule(
  schedule: PipelineSchedule,
  times: OperationTimes | ((stage: number, operation: PipelineOperation) => number),
): ScheduleTimes {
  const timeOf = typeof times === 'function' ? times : (_: number, { kind }: PipelineOperation) => times[kind];
  const stages = schedule.length;
  const done = new Map<string, number>();
  const key = (stage: number, { kind, microBatch }: PipelineOperation): string => `${stage} ${kind} ${microBatch}`;
  const neededBy = (stage: number, operation: PipelineOperation): string | undefined => {
    if (operation.kind === 'forward') return stage === 0 ? undefined : key(stage - 1, operation);
    return stage === stages - 1 ? key(stage, forward(operation.microBatch)) : key(stage + 1, operation);
  };
  const start: number[][] = schedule.map(() => []);
  const free = schedule.map(() => 0);
  let busy = 0;
  /** Runs what a stage can run now; says whether that was anything. */
  const advance = (stage: number, operations: readonly PipelineOperation[]): boolean => {
    const begins = start[stage] as number[];
    const before = begins.length;
    for (const operation of operations.slice(before)) {
      const needed = neededBy(stage, operation);
      const ready = needed === undefined ? 0 : done.get(needed);
      if (ready === undefined) break;
      const begin = Math.max(ready, free[stage] as number);
      begins.push(begin);
      const time = timeOf(stage, operation);
      free[stage] = begin + time;
      busy += time;
      done.set(key(stage, operation), free[stage] as number);
    }
    return begins.length > before;
  };
  while (schedule.map((operations, stage) => advance(stage, operations)).some(Boolean));
  schedule.forEach((operations, stage) => {
    const next = operations[(start[stage] as number[]).length];
    if (next === undefined) return;
    const message =
      `The schedule never ends: stage ${stage} waits for ever before the ${next.kind} of micro-batch ${next.microBatch}. ` +
      'A forward must run on the stage before, a backward on the stage after, and nothing may wait in a circle.';
    throw new LockstepError('SCHEDULE_INVALID', message, { stage, operation: next });
  });
  const makespan = Math.max(...free);
  const idle = stages * makespan - busy;
  return { start, makespan, bubbleFraction: idle / (stages * makespan), bubbleOverIdeal: idle / busy };
}

/** Most micro-batches that each stage holds between their forward and their backward. */
export function microBatchesInFlight(schedule: PipelineSchedule): number[] {
  return schedule.map((operations) => {
    let held = 0;
    let most = 0;
    for (const { kind } of operations) {
      held += kind === 'forward' ? 1 : -1;
      most = Math.max(most, held);
    }
    return most;
  });
}
