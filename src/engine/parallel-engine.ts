/**
 * A model over several ranks of this process: data-parallel replicas, each a pipeline of stages, each stage a tensor group
 * (layout/shards.ts). Each call runs on all ranks at the same time; a replica's answers are those of its last stage's first rank.
 * Over pipeline and tensor ranks the bits are one rank's, at equal parts.
 */
import type { TokenBatch } from '../data/batch.js';
import { checkTokens } from '../data/examples.js';
import { LockstepError } from '../errors.js';
import type { TransitionEngine } from '../layout/hybrid-engine.js';
import type { ModelShape } from '../layout/model-shape.js';
import { type Degrees, type GenerationDegrees, worldSize } from '../layout/parallel.js';
import { resolveParts } from '../layout/parts.js';
import type { ScheduleName } from '../layout/pipeline-schedule.js';
import { rankShare } from '../layout/rank-share.js';
import type { Device } from './device.js';
import { awaitedLater, rethrow } from './device.js';
import type {
  AccumulateOptions,
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
import { generateOver, Replica } from './replica.js';
import { readShards, writeShards } from './shard-access.js';
import { together } from './together.js';
import { cutGradients, cutRows, joinResults } from './token-shards.js';
import { planPipeline, runBreadthFirst, type Stages } from './training-schedules.js';

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
  /**
   * ZeRO stage: what is divided among the replicas. 1: optimizer state; 2: and gradients; 3: and compute weights. Default 0.
   */
  zero?: number;
  /** Bytes of gradients that replicas reduce together. Default: `defaultBucketBytes` (layout/units.ts). */
  bucketBytes?: number;
  /** What replicas exchange goes on behind the computation. Default true. */
  overlap?: boolean;
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
  /** The gradients are those of all replicas, or pieces of them: nothing can be added before the step. */
  private reduced = false;

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
    this.zero = stageOf(options);
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
    const { shape, devices, dtype, train = false, recompute = false, overlap = true, timeoutSeconds = 300 } = options;
    const { generation, transition: engine = 'hybridflow' } = options;
    const parts = resolveParts(shape, options.parts);
    const degrees: Degrees = { data: 1, ...options.degrees };
    checkDegrees(shape, parts, degrees, devices.length);
    const zero = stageOf(options);
    const sharing = { zero, overlap, ...(options.bucketBytes ? { bucketBytes: options.bucketBytes } : {}) };
    const world = rethrow(() => new (loadNative().World)({ ranks: devices.length, timeoutSeconds }));
    const ranks: NativeEngine[] = [];
    const hybrid =
      generation &&
      (await HybridEngine.create({ shape, parts, dtype, train: degrees, generation, engine, devices, timeoutSeconds }));
    try {
      for (const [rank, device] of devices.entries()) {
        const common = { shape, device, dtype, train, recompute, parts, ...sharing };
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
    const calls = this.stages.flatMap((stages, replica) => {
      const own = shards[replica]!;
      const batches = own.lengths.length === 0 ? [] : [own];
      return stages.flat().map((rank) => ({ rank, call: rank.planForward(batches, options) }));
    });
    const results = await together(calls.map(({ rank, call }) => rank.runForward(call)));
    const leaders = new Set(this.stages.map((stages) => stages.at(-1)![0]));
    return joinResults(results.filter((_, i) => leaders.has(calls[i]!.rank)).flat());
  }

  forwardEach(batches: readonly TokenBatch[], options: Omit<ForwardOptions, 'keep'>): Promise<ForwardResult[]> {
    return together(batches.map((batch) => this.forward(batch, options)));
  }

  /** Before any rank starts: what one rank refuses would end the work of all of them for good. */
  private checkBatch({ tokens, lengths }: TokenBatch): void {
    const { maxPositions } = this.shape;
    checkTokens(tokens, this.shape.vocabulary, 'the batch');
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
    // Later stages keep pieces of gradients only: no other backward can add to them.
    const last = this.zero >= 2;
    this.open(last);
    const parts = cutGradients(gradients, shards);
    await together(
      this.stages.flatMap((stages, replica) => {
        const passes = shards[replica]!.lengths.length === 0 ? [] : [{ slot: 0, ...parts[replica] }];
        return stages.flat().map((rank) => rank.runBackward(passes, { more: false, last }));
      }),
    );
  }

  /** Before gradients are added to; `last`: for the last time before the step. */
  private open(last: boolean): void {
    if (this.reduced) {
      const message =
        'The gradients of this step are reduced over the replicas and cannot be added to. Call step first, give accumulate all ' +
        `micro-batches of the step${this.zero < 2 ? ', or `final: false` before its last call' : ` (ZeRO stage ${this.zero} keeps pieces of gradients only)`}.`;
      throw new LockstepError('GRADIENTS_REDUCED', message);
    }
    this.reduced = last && this.replicas > 1;
  }

  async accumulate(
    microBatches: MicroBatches,
    { final = true, ...wanted }: AccumulateOptions,
    gradientsOf: GradientsOf,
  ): Promise<void> {
    this.kept = undefined;
    for (const batch of microBatches.flat()) this.checkBatch(batch);
    const options = { ...wanted, keep: true };
    this.open(final || this.zero >= 2);
    try {
      if (this.zero >= 2) {
        const replicas = this.stages.map(([only]) => only!);
        await runBreadthFirst(replicas, microBatches, options, gradientsOf);
      } else {
        const { schedule } = this;
        const runs = this.stages.map((stages, replica) =>
          planPipeline(stages, microBatches[replica] ?? [], { ...options, schedule, final }),
        );
        await together(runs.map((run, replica) => run((outputs, index) => gradientsOf(outputs, replica, index))));
      }
    } catch (error) {
      await Promise.allSettled(this.ranks.map((rank) => rank.clearGradients()));
      this.reduced = false;
      throw error;
    }
  }

  async step(options: StepOptions): Promise<StepResult> {
    this.reduced = false;
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
    // With divided weights all replicas gather them, whether they have requests or not.
    return generateOver(replicas, requests, options, this.zero >= 3);
  }

  /** Reading gradients reduces them: nothing can be added before the step. */
  async readTensor(name: string, space: ParameterSpace = 'weights'): Promise<Float32Array> {
    if (space === 'gradients' && this.replicas > 1 && this.zero < 2) {
      this.reduced = true;
      await together(this.ranks.map((rank) => rank.reduceGradients()));
    }
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

/**
 * The ZeRO stage, 0 where there is nothing to divide.
 * @throws LockstepError PARALLEL_INVALID
 */
function stageOf({ zero = 0, generation, degrees: { pipeline, data = 1 } }: ParallelOptions): number {
  if (!Number.isInteger(zero) || zero < 0 || zero > 3) {
    const message = `parallel.zero: expected 0, 1, 2 or 3, received ${zero}.`;
    throw new LockstepError('PARALLEL_INVALID', message, { key: 'parallel.zero', received: zero });
  }
  if (zero >= 2 && pipeline > 1) {
    const message =
      `parallel.zero: ${zero} is not possible with parallel.pipeline ${pipeline}: gradients that are divided have to pass a layer ` +
      'for all micro-batches at once, while a pipeline takes one after the other through its stages. Set parallel.zero to 1, or ' +
      'parallel.pipeline to 1.';
    throw new LockstepError('PARALLEL_INVALID', message, { key: 'parallel.zero', received: zero, pipeline });
  }
  if (zero === 3 && data > 1 && generation) {
    const message =
      'parallel.zero: 3 is not possible with a generation layout of its own: weights that are divided among replicas are no shards ' +
      'to generate from. Set parallel.zero to 2, or leave out generation.';
    throw new LockstepError('PARALLEL_INVALID', message, { key: 'parallel.zero', received: zero, generation });
  }
  return data > 1 ? zero : 0;
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
