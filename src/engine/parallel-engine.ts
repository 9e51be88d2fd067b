/**
 * A model over several ranks of this process: tensor parallel inside a stage, stages in a pipeline (layout/shards.ts). Each call
 * runs on all ranks at the same time; the last stage's first rank answers. The bits are one rank's, at equal parts.
 */
import type { TokenBatch } from '../data/batch.js';
import { LockstepError } from '../errors.js';
import type { TransitionEngine } from '../layout/hybrid-engine.js';
import type { ModelShape } from '../layout/model-shape.js';
import { type Degrees, type GenerationDegrees, worldSize } from '../layout/parallel.js';
import { resolveParts } from '../layout/parts.js';
import { rankShare } from '../layout/rank-share.js';
import type { Device } from './device.js';
import { rethrow } from './device.js';
import type {
  Dtype,
  Engine,
  EngineMemory,
  ForwardOptions,
  ForwardResult,
  Generated,
  GenerateOptions,
  GenerateRequest,
  ParameterSpace,
  StepResult,
} from './engine.js';
import { HybridEngine } from './hybrid-engine.js';
import { loadNative } from './native.js';
import { NativeEngine } from './native-engine.js';
import { checkTokens, Replica } from './replica.js';
import { readShards, writeShards } from './shard-access.js';
import { together } from './together.js';

export { together } from './together.js';

export interface ParallelOptions {
  shape: ModelShape;
  /** One per rank, in their order: rank = stage x tensor + place in the stage. */
  devices: readonly Device[];
  degrees: { pipeline: number; tensor: number };
  dtype: Dtype;
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
  readonly ranks: readonly NativeEngine[];
  /** The generation layout, where it is another. */
  readonly hybrid: HybridEngine | undefined;

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
    this.ranks = ranks;
    this.hybrid = hybrid;
  }

  /**
   * Parameters start at zero: `load` or `writeTensor` fills them.
   * @throws LockstepError PARALLEL_INVALID, PARTS_INVALID, RANKS_INVALID, MEMORY_BUDGET
   */
  static async create(options: ParallelOptions): Promise<ParallelEngine> {
    const { shape, devices, dtype, generation, transition: engine = 'hybridflow', timeoutSeconds = 300 } = options;
    const parts = resolveParts(shape, options.parts);
    const degrees: Degrees = { ...options.degrees, data: 1 };
    checkDegrees(shape, parts, degrees, devices.length);
    const world = rethrow(() => new (loadNative().World)({ ranks: devices.length, timeoutSeconds }));
    const ranks: NativeEngine[] = [];
    const hybrid =
      generation &&
      (await HybridEngine.create({ shape, parts, dtype, train: degrees, generation, engine, devices, timeoutSeconds }));
    try {
      for (const [rank, device] of devices.entries()) {
        const weights = hybrid ? { weights: hybrid.trainingWeights(rank) } : {};
        ranks.push(new NativeEngine({ shape, device, dtype, parts, rank: { degrees, rank, world }, ...weights }));
      }
      await together(ranks.map((rank) => rank.join()));
    } catch (error) {
      for (const rank of ranks) await rank.close();
      await hybrid?.close();
      throw error;
    }
    return new ParallelEngine(options, degrees, ranks, hybrid);
  }

  /** The rank that has the answers. */
  private get leader(): number {
    return (this.degrees.pipeline - 1) * this.degrees.tensor;
  }

  async forward(batch: TokenBatch, options: ForwardOptions): Promise<ForwardResult> {
    if (options.keep) throw unsupported('keeps no activations for backward');
    this.checkBatch(batch);
    const calls = this.ranks.map((rank) => rank.planForward(batch, options));
    const results = await together(this.ranks.map((rank, i) => rank.runForward(calls[i]!)));
    return results[this.leader]!;
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

  async backward(): Promise<void> {
    throw unsupported('has no backward pass');
  }

  async step(): Promise<StepResult> {
    throw unsupported('takes no optimizer step');
  }

  /** In the generation layout, where there is one: there, and back afterwards. */
  async generate(requests: readonly GenerateRequest[], options: GenerateOptions): Promise<Generated[]> {
    options.signal?.throwIfAborted();
    if (requests.length === 0) return [];
    if (this.hybrid) return this.hybrid.generate(requests, options);
    const replica = new Replica(this.ranks, this.leader);
    return replica.run(replica.plan(requests, options), options);
  }

  readTensor(name: string, space: ParameterSpace = 'weights'): Promise<Float32Array> {
    return readShards(this.ranks, name, space);
  }

  writeTensor(name: string, data: Float32Array, space: ParameterSpace = 'weights'): Promise<void> {
    return writeShards(this.ranks, name, data, space);
  }

  async publish(): Promise<void> {
    await together(this.ranks.map((rank) => rank.publish()));
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
  const message = `pipeline ${degrees.pipeline} x tensor ${degrees.tensor} takes ${world} devices, one per rank; received ${devices}.`;
  throw new LockstepError('RANKS_INVALID', message, { expected: world, received: devices });
}

function unsupported(what: string): LockstepError {
  const message = `A model on several ranks ${what} in this version; run it on one rank (pipeline 1, tensor 1).`;
  return new LockstepError('RANKS_UNSUPPORTED', message);
}
