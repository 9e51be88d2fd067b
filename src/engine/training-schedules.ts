/**
 * How the micro-batches of a step go through the ranks: one after the other through the stages of a pipeline, or breadth first,
 * all of them through a layer before any goes on to the next [2211.05953].
 */
import type { TokenBatch } from '../data/batch.js';
import { wholeSequences } from '../layout/memory-plan.js';
import {
  microBatchesInFlight,
  type PipelineOperation,
  type ScheduleName,
  scheduleOfRun,
} from '../layout/pipeline-schedule.js';
import type { ForwardOptions, ForwardResult, GradientsOf, MicroBatches, TokenGradients } from './engine.js';
import type { NativeEngine } from './native-engine.js';
import { together } from './together.js';

/** Ranks of a replica by stage, in tensor order. */
export type Stages = readonly (readonly NativeEngine[])[];

export interface PipelineOptions extends ForwardOptions {
  schedule: ScheduleName;
  /** The step ends with these micro-batches. */
  final: boolean;
}

/**
 * One replica's micro-batches, planned; they run when the result is called. All stages but the last have their operations
 * queued at once: they wait for each other's messages, not for JavaScript. When `gradientsOf` fails the pipeline is emptied
 * with gradients of zero, so that the other replicas find the reduction of theirs complete.
 */
export function planPipeline(
  stages: Stages,
  microBatches: readonly TokenBatch[],
  { schedule, final, ...options }: PipelineOptions,
): (gradientsOf: (outputs: ForwardResult, index: number) => TokenGradients) => Promise<void> {
  if (microBatches.length === 0) {
    return async () => {
      await together(stages.flat().map((rank) => rank.runBackward([], { more: false, last: final })));
    };
  }
  const operations = scheduleOfRun(schedule, stages.length, microBatches.length);
  const slotCounts = microBatchesInFlight(operations);
  const sizes = microBatches.map(({ lengths }) => wholeSequences(lengths, stages[0]![0]!.device.rowGrain));
  const slots = slotCounts.map((count) => ({ count, sizes }));
  // Both schedules end micro-batches in the order in which they begin them.
  const slotOf = (stage: number, { microBatch }: PipelineOperation): number => microBatch % slotCounts[stage]!;
  const isLast = (stage: number, index: number): boolean => index + 1 === operations[stage]!.length;
  const forwards = stages.map((ranks, stage) =>
    operations[stage]!.map((operation, index) => {
      if (operation.kind === 'backward') return [];
      const kept = {
        slot: slotOf(stage, operation),
        slots: slots[stage]!,
        first: index === 0,
        more: !isLast(stage, index),
      };
      return ranks.map((rank) => rank.planForward([microBatches[operation.microBatch]!], options, kept));
    }),
  );
  return async (gradientsOf) => {
    const running: Promise<unknown>[] = [];
    const forward = (stage: number, index: number): Promise<ForwardResult> => {
      const { microBatch } = operations[stage]![index]!;
      const calls = stages[stage]!.map((rank, r) => rank.runForward(forwards[stage]![index]![r]!, microBatch));
      running.push(...calls);
      return calls[0]!.then(([result]) => result!);
    };
    const backward = (stage: number, index: number, gradients: TokenGradients): void => {
      const operation = operations[stage]![index]!;
      const passes = [{ slot: slotOf(stage, operation), ...gradients }];
      const last = isLast(stage, index);
      const how = { more: !last, last: last && final };
      running.push(...stages[stage]!.map((rank) => rank.runBackward(passes, how, operation.microBatch)));
    };
    const end = stages.length - 1;
    for (let stage = 0; stage < end; stage++) {
      for (const [index, { kind }] of operations[stage]!.entries()) {
        if (kind === 'forward') forward(stage, index).catch(() => undefined);
        else backward(stage, index, {});
      }
    }
    const outputs: Promise<ForwardResult>[] = [];
    let thrown: { error: unknown } | undefined;
    for (const [index, { kind, microBatch }] of operations[end]!.entries()) {
      if (kind === 'forward') {
        outputs[microBatch] = forward(end, index);
        continue;
      }
      const result = await outputs[microBatch]!.catch(() => undefined);
      if (result === undefined) break; // a rank has failed, and with it all
      let gradients: TokenGradients = {};
      try {
        if (!thrown) gradients = gradientsOf(result, microBatch);
      } catch (error) {
        thrown = { error };
      }
      backward(end, index, gradients);
    }
    await together(running);
    if (thrown) throw thrown.error;
  };
}

/** Of replicas of one stage each; a replica without micro-batches takes part in what they exchange. */
export async function runBreadthFirst(
  replicas: readonly (readonly NativeEngine[])[],
  microBatches: MicroBatches,
  options: ForwardOptions,
  gradientsOf: GradientsOf,
): Promise<void> {
  const calls = replicas.flatMap((ranks, replica) =>
    ranks.map((rank) => ({ rank, replica, call: rank.planForward(microBatches[replica] ?? [], options) })),
  );
  const results = await together(calls.map(({ rank, call }) => rank.runForward(call)));
  const passes = replicas.map((ranks, replica) => {
    const outputs = results[calls.findIndex(({ rank }) => rank === ranks[0])]!;
    return outputs.map((output, index) => ({ slot: index, ...gradientsOf(output, replica, index) }));
  });
  await together(calls.map(({ rank, replica }) => rank.runBackward(passes[replica]!, { more: false, last: true })));
}
