/**
 * A model over several ranks of this process: data-parallel replicas, each a pipeline of stages, each stage a tensor group
 * (layout/shards.ts). Each call runs on all ranks at the same time; a replica's answers are those of its last stage's first rank.
 * Over pipeline and tensor ranks the bits are one rank's, at equal parts.
 */
import type { TokenBatch } from '../data/batch.js';
import { LockstepError } from '../errors.js';
import type { TransitionEngine } from '../layout/hybrid-engine.js';
import { wholeSequences } from '../layout/memory-plan.js';
import type { ModelShape } from '../layout/model-shape.js';
import { type Degrees, type GenerationDegrees, worldSize } from '../layout/parallel.js';
import { resolveParts } from '../layout/parts.js';
import {
  microBatchesInFlight,
  type PipelineOperation,
  pipelineSchedules,
  type ScheduleName,
} from '../layout/pipeline-schedule.js';
import { rankShare } from '../layout/rank-share.js';
import type { Device } from './device.js';
import { awaitedLater, rethrow } from './device.js';
import type {
  Dtype,
  Engine,
  EngineMemory,
  FileTensor,
  ForwardOptions,
  ForwardResult,
  Generated,
  GenerateOptions,
  GenerateRequest,
  GradientsOf,
  MicroBatches,
  ParameterSpace,
  Saving,
  StepOptions,
  StepResult,
  TokenGradients,
} from './engine.js';
import { HybridEngine } from './hybrid-engine.js';
import type { ModelState } from './model-state.js';
import { loadNative } from './native.js';
import { NativeEngine } from './native-engine.js';
import { checkTokens, generateOver, Replica } from './replica.js';
import { readShards, writeShards } from './shard-access.js';
import { together } from './together.js';
import { cutGradients, cutRows, joinResults } from './token-shards.js';

export { together } from './together.js';

export interface ParallelOptions {
  shape: ModelShape;
  /** One per rank, in their order: rank = (replica x pipeline + stage) x tensor + place in the stage. */
  devices: readonly Device[];
  degrees: { pipeline: number; tensor: number; data?: number };
  dtype: Dtype;
  /** Gradients, moments and masters are held too. Default false. */
  train?: boolean;
  /** Layers keep only their input for backward and are computed again. Default false. */
  recompute?: boolean;
  /** ZeRO stage: 0, or 1, which divides the optimizer state among the replicas. Default 0. */
  zero?: number;
  /** Order of forwards and backwards on the stages (layout/pipeline-schedule.ts). Default 1f1b. */
  schedule?: ScheduleName;
  /** numerics.parts; default: the rule of DESIGN §2. */
  parts?: number | 'auto';
  /** A rank for which others wait so long without a sign of life is taken for dead. Default 300. */
  timeoutSeconds?: number;
  /** Generates in this layout: replicas of pipeline x tensor ranks. Default: in the training layout. */
  generation?: GenerationDegrees;
  /** How weights come from one layout to the other. Default hybridflow. */
  transition?: TransitionEngine;
}

/** Ranks of a replica by stage, in tensor order. */
type Stages = readonly (readonly NativeEngine[])[];

export class ParallelEngine implements Engine {
  readonly shape: ModelShape;
  readonly dtype: Dtype;
  readonly parts: number;
  readonly degrees: Degrees;
  readonly replicas: number;
  readonly ranks: readonly NativeEngine[];
  /** The generation layout, where it is another. */
  readonly hybrid: HybridEngine | undefined;
  private readonly stages: readonly Stages[];
  private readonly schedule: ScheduleName;
  private readonly zero: number;
  /** Of the last `forward` with `keep`: the rows of each replica. */
  private kept: readonly TokenBatch[] | undefined;

  private constructor(
    options: ParallelOptions,
    degrees: Degrees,
    ranks: readonly NativeEngine[],
    hybrid: HybridEngine | undefined,
  ) {
    this.shape = options.shape;
    this.dtype = options.dtype;
    this.parts = resolveParts(options.shape, options.parts);
    this.degrees = degrees;
    this.replicas = degrees.data;
    this.ranks = ranks;
    this.hybrid = hybrid;
    this.schedule = options.schedule ?? '1f1b';
    this.zero = options.zero ?? 0;
    const { pipeline, tensor, data } = degrees;
    const from = (begin: number) => ranks.slice(begin, begin + tensor);
    this.stages = Array.from({ length: data }, (_, replica) =>
      Array.from({ length: pipeline }, (_, stage) => from((replica * pipeline + stage) * tensor)),
    );
  }

  /**
   * Parameters start at zero: `load` or `writeTensor` fills them.
   * @throws LockstepError PARALLEL_INVALID, PARTS_INVALID, RANKS_INVALID, MEMORY_BUDGET
   */
  static async create(options: ParallelOptions): Promise<ParallelEngine> {
    const { shape, devices, dtype, train = false, recompute = false, zero = 0, timeoutSeconds = 300 } = options;
    const { generation, transition: engine = 'hybridflow' } = options;
    const parts = resolveParts(shape, options.parts);
    const degrees: Degrees = { data: 1, ...options.degrees };
    checkDegrees(shape, parts, degrees, devices.length);
    const world = rethrow(() => new (loadNative().World)({ ranks: devices.length, timeoutSeconds }));
    const ranks: NativeEngine[] = [];
    const hybrid =
      generation &&
      (await HybridEngine.create({ shape, parts, dtype, train: degrees, generation, engine, devices, timeoutSeconds }));
    try {
      for (const [rank, device] of devices.entries()) {
        const common = { shape, device, dtype, train, recompute, zero, parts };
        const weights = hybrid ? { weights: hybrid.trainingWeights(rank) } : {};
        ranks.push(new NativeEngine({ ...common, rank: { degrees, rank, world }, ...weights }));
      }
      await together(ranks.map((rank) => rank.join()));
    } catch (error) {
      for (const rank of ranks) await rank.close();
      await hybrid?.close();
      throw error;
    }
    return new ParallelEngine(options, degrees, ranks, hybrid);
  }

  set onTransition(report: Engine['onTransition']) {
    if (this.hybrid) this.hybrid.onTransition = report;
  }

  /** The state of every rank, in their order. */
  get states(): readonly ModelState[] {
    return this.ranks.map((rank) => rank.state);
  }

  /** With several replicas each takes its share of the rows. */
  async forward(batch: TokenBatch, options: ForwardOptions): Promise<ForwardResult> {
    this.checkBatch(batch);
    const shards = cutRows(batch, this.replicas);
    this.kept = options.keep ? shards : undefined;
    const calls = this.stages.flatMap((stages, replica) =>
      shards[replica]!.lengths.length === 0
        ? []
        : stages.flat().map((rank) => ({ rank, call: rank.planForward(shards[replica]!, options) })),
    );
    const results = await together(calls.map(({ rank, call }) => rank.runForward(call)));
    const leaders = new Set(this.stages.map((stages) => stages.at(-1)![0]));
    return joinResults(results.filter((_, i) => leaders.has(calls[i]!.rank)));
  }

  forwardEach(batches: readonly TokenBatch[], options: Omit<ForwardOptions, 'keep'>): Promise<ForwardResult[]> {
    return together(batches.map((batch) => this.forward(batch, options)));
  }

  /** Before any rank starts: what one rank refuses would end the work of all of them for good. */
  private checkBatch({ tokens, lengths }: TokenBatch): void {
    const { maxPositions } = this.shape;
    checkTokens(this.shape, tokens, 'the batch');
    const wrong = lengths.findIndex((length) => length < 1 || length > maxPositions);
    if (wrong >= 0) {
      const message = `Sequence ${wrong} has ${lengths[wrong]} tokens; the model takes 1..${maxPositions}.`;
      throw new LockstepError('SEQUENCE_TOO_LONG', message, { sequence: wrong, tokens: lengths[wrong] });
    }
  }

  async backward(gradients: TokenGradients): Promise<void> {
    const shards = this.kept;
    this.kept = undefined;
    if (!shards) {
      const message = 'backward needs a forward with `keep` before it and no other call between.';
      throw new LockstepError('NO_FORWARD', message);
    }
    const parts = cutGradients(gradients, shards);
    const busy = this.stages.filter((_, replica) => shards[replica]!.lengths.length > 0);
    await together(busy.flatMap((stages, i) => stages.flat().map((rank) => rank.runBackward(0, false, parts[i]!))));
  }

  async accumulate(
    microBatches: MicroBatches,
    options: Omit<ForwardOptions, 'keep'>,
    gradientsOf: GradientsOf,
  ): Promise<void> {
    this.kept = undefined;
    for (const batch of microBatches.flat()) this.checkBatch(batch);
    try {
      await together(
        this.stages.map((stages, replica) =>
          runReplica(stages, this.schedule, microBatches[replica] ?? [], { ...options, keep: true }, (outputs, index) =>
            gradientsOf(outputs, replica, index),
          ),
        ),
      );
    } catch (error) {
      await Promise.allSettled(this.ranks.map((rank) => rank.clearGradients()));
      throw error;
    }
  }

  async step(options: StepOptions): Promise<StepResult> {
    const [result] = await together(this.ranks.map((rank) => rank.step(options)));
    return result!;
  }

  /** In the generation layout, where there is one: there, and back afterwards. */
  async generate(requests: readonly GenerateRequest[], options: GenerateOptions): Promise<Generated[]> {
    options.signal?.throwIfAborted();
    if (requests.length === 0) return [];
    if (this.hybrid) return this.hybrid.generate(requests, options);
    const leader = (this.degrees.pipeline - 1) * this.degrees.tensor;
    const replicas = this.stages.map((stages) => new Replica(stages.flat(), leader));
    return generateOver(replicas, requests, options);
  }

  readTensor(name: string, space: ParameterSpace = 'weights'): Promise<Float32Array> {
    return readShards(this.replicaRanks(), name, space, this.zero > 0);
  }

  writeTensor(name: string, data: Float32Array, space: ParameterSpace = 'weights'): Promise<void> {
    return writeShards(this.ranks, name, data, space);
  }

  private replicaRanks(): NativeEngine[][] {
    return this.stages.map((stages) => stages.flat());
  }

  async publish(): Promise<void> {
    await together(this.ranks.map((rank) => rank.publish()));
  }

  async load(tensors: readonly FileTensor[]): Promise<void> {
    await together(this.ranks.map((rank) => rank.load(tensors)));
  }

  async save(tensors: readonly FileTensor[], options: { copy?: boolean } = {}): Promise<Saving> {
    const savings = await together(this.ranks.map((rank) => rank.save(tensors, options)));
    return {
      copiedBytes: savings.reduce((sum, { copiedBytes }) => sum + copiedBytes, 0),
      written: awaitedLater(together(savings.map(({ written }) => written)).then(() => undefined)),
    };
  }

  /** Arenas of every rank, as `rank 0 weights`. */
  memory(): EngineMemory {
    return Object.fromEntries(
      this.ranks.flatMap((rank, i) =>
        Object.entries(rank.memory()).map(([arena, bytes]) => [`rank ${i} ${arena}`, bytes]),
      ),
    );
  }

  /** Frees the models; the devices end the work that still runs when they are closed. */
  async close(): Promise<void> {
    for (const rank of this.ranks) await rank.close();
    await this.hybrid?.close();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** Every rank's share is possible, and there is a device for each. */
function checkDegrees(shape: ModelShape, parts: number, degrees: Degrees, devices: number): void {
  const world = worldSize(degrees);
  for (let rank = 0; rank < world; rank++) rankShare(shape, parts, degrees, rank);
  if (devices === world) return;
  const { pipeline, tensor, data } = degrees;
  const message = `pipeline ${pipeline} x tensor ${tensor} x data ${data} takes ${world} devices, one per rank; received ${devices}.`;
  throw new LockstepError('RANKS_INVALID', message, { expected: world, received: devices });
}

/**
 * One replica's micro-batches through its pipeline. All stages but the last have their operations queued at once: they wait
 * for each other's messages, not for JavaScript. When `gradientsOf` fails the pipeline is emptied with gradients of zero.
 */
async function runReplica(
  stages: Stages,
  schedule: ScheduleName,
  microBatches: readonly TokenBatch[],
  options: ForwardOptions,
  gradientsOf: (outputs: ForwardResult, index: number) => TokenGradients,
): Promise<void> {
  if (microBatches.length === 0) return;
  const operations = pipelineSchedules[schedule](stages.length, microBatches.length);
  const slotCounts = microBatchesInFlight(operations);
  const sizes = microBatches.map(({ lengths }) => wholeSequences(lengths));
  const slots = slotCounts.map((count) => ({ count, sizes }));
  // Both schedules end micro-batches in the order in which they begin them.
  const slotOf = (stage: number, { microBatch }: PipelineOperation): number => microBatch % slotCounts[stage]!;
  const isLast = (stage: number, index: number): boolean => index + 1 === operations[stage]!.length;
  // Planned before anything runs: what a rank refuses would leave the others waiting.
  const forwards = stages.map((ranks, stage) =>
    operations[stage]!.map((operation, index) => {
      if (operation.kind === 'backward') return [];
      const pass = {
        slot: slotOf(stage, operation),
        slots: slots[stage]!,
        first: index === 0,
        more: !isLast(stage, index),
      };
      return ranks.map((rank) => rank.planForward(microBatches[operation.microBatch]!, options, pass));
    }),
  );
  const running: Promise<unknown>[] = [];
  const forward = (stage: number, index: number): Promise<ForwardResult> => {
    const { microBatch } = operations[stage]![index]!;
    const calls = stages[stage]!.map((rank, r) => rank.runForward(forwards[stage]![index]![r]!, microBatch));
    running.push(...calls);
    return calls[0]!;
  };
  const backward = (stage: number, index: number, gradients: TokenGradients): void => {
    const operation = operations[stage]![index]!;
    const { microBatch } = operation;
    const slot = slotOf(stage, operation);
    const more = !isLast(stage, index);
    running.push(...stages[stage]!.map((rank) => rank.runBackward(slot, more, gradients, microBatch)));
  };
  const last = stages.length - 1;
  for (let stage = 0; stage < last; stage++) {
    for (const [index, { kind }] of operations[stage]!.entries()) {
      if (kind === 'forward') void forward(stage, index);
      else backward(stage, index, {});
    }
  }
  const outputs: Promise<ForwardResult>[] = [];
  let thrown: { error: unknown } | undefined;
  for (const [index, { kind, microBatch }] of operations[last]!.entries()) {
    if (kind === 'forward') {
      outputs[microBatch] = forward(last, index);
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
    backward(last, index, gradients);
  }
  await together(running);
  if (thrown) throw thrown.error;
}
