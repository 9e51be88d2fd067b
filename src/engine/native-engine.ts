/** The engine over the addon: plans every call in layout/ and hands it to the rank's thread. */
import type { TokenBatch } from '../data/batch.js';
import { LockstepError } from '../errors.js';
import {
  type CallPlan,
  planGeneration,
  planModel,
  planScoring,
  planTraining,
  type Slots,
  wholeSequences,
} from '../layout/memory-plan.js';
import type { ModelShape } from '../layout/model-shape.js';
import type { Degrees } from '../layout/parallel.js';
import { resolveParts } from '../layout/parts.js';
import { type RankShare, rankShare } from '../layout/rank-share.js';
import { type ShardTensor, shardTable } from '../layout/shards.js';
import type { TensorSource } from '../layout/tensor-table.js';
import { type ParameterUnit, parameterUnits, planUnits, type UnitUse } from '../layout/units.js';
import { accumulateInTurn } from './accumulate.js';
import { awaitedLater, type Device, rethrow, untimed, type Work } from './device.js';
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
  GenerateProgress,
  GenerateRequest,
  GradientsOf,
  MicroBatches,
  ParameterSpace,
  Saving,
  StepOptions,
  StepResult,
  TokenGradients,
} from './engine.js';
import { slicesToLoad, slicesToSave } from './file-slices.js';
import { type GenerationNeeds, generationNeeds, speculationRows } from './generation-needs.js';
import { ModelState, moveState, type StateGroup, type StatePlaces } from './model-state.js';
import {
  type GenerationStatistics,
  type KeptGradients,
  loadNative,
  type NativeForward,
  type NativeGenerate,
  type NativeModel,
  type NativePieces,
  type NativeTraffic,
  type Timed,
} from './native.js';
import { nativeSpec } from './native-spec.js';
import type { EngineOptions } from './rank-options.js';

/** Forwards whose activations stay, among others that are under way. */
export interface Kept {
  /** Of the first. */
  slot: number;
  slots: Slots;
  first: boolean;
  /** The rank has another operation of these micro-batches to do. */
  more: boolean;
}

const alone: Degrees = { pipeline: 1, tensor: 1, data: 1 };

/** Operations that use the state, by their names in messages, and the groups they need; `read` and `write` those of a space. */
const operations = {
  load: ['Loading a checkpoint', ['parameters', 'optimizer']],
  save: ['Saving a checkpoint', ['parameters', 'optimizer']],
  snapshot: ['Saving a checkpoint', ['parameters', 'optimizer']],
  forward: ['A forward pass', ['parameters']],
  backward: ['A backward pass', ['parameters', 'gradients']],
  reduce: ['Reducing the gradients', ['gradients']],
  clear: ['Clearing the gradients', ['gradients']],
  step: ['An optimizer step', ['parameters', 'gradients', 'optimizer']],
  generate: ['Generation', ['parameters']],
  read: ['Reading a tensor', []],
  write: ['Writing a tensor', []],
  publish: ['Publishing the weights', ['parameters', 'optimizer']],
} as const satisfies Partial<Record<Work['operation'], readonly [what: string, groups: readonly StateGroup[]]>>;

type Operation = keyof typeof operations;

/** Where rows of a checkpoint tensor are in the engine. */
export interface TensorHome {
  index: number;
  spec: ShardTensor;
  source: TensorSource;
}

/** One rank's model, or its part of one. Parameters start at zero: `load` or `writeTensor` fills them. */
export class NativeEngine implements Engine {
  readonly shape: ModelShape;
  readonly dtype: Dtype;
  readonly parts: number;
  /** What the rank has of the model. */
  readonly share: RankShare;
  readonly table: readonly ShardTensor[];
  readonly replicas = 1;
  /** Its state, which can leave the device. */
  readonly state: ModelState;
  /** Of the last `generate`. */
  lastGeneration: GenerationStatistics | undefined;
  /** Among those of its world. */
  readonly device: Device;
  private readonly recompute: boolean;
  private readonly train: boolean;
  private readonly degrees: Degrees;
  private readonly rank: number;
  private readonly zero: number;
  private readonly units: readonly ParameterUnit[];
  private readonly native: NativeModel;
  private readonly homes = new Map<string, TensorHome[]>();

  constructor(options: EngineOptions) {
    this.shape = options.shape;
    this.device = options.device;
    this.dtype = options.dtype;
    this.train = options.train ?? false;
    this.recompute = options.recompute ?? false;
    this.parts = resolveParts(options.shape, options.parts);
    const { rank, weights } = options;
    this.degrees = rank?.degrees ?? alone;
    this.rank = rank?.rank ?? 0;
    this.zero = options.zero ?? 0;
    this.share = rankShare(this.shape, this.parts, this.degrees, this.rank, rank?.stages);
    this.table = shardTable(this.shape, this.parts, this.degrees, this.rank, rank?.stages);
    this.units = parameterUnits(this.table, this.share.shape.layers, options.bucketBytes);
    const { dataRank, dataRanks } = this.share;
    const plan = planModel(this.table, this.dtype, this.train, { stage: this.zero, rank: dataRank, ranks: dataRanks });
    const { gradientBytes: gradients, optimizerBytes: optimizer } = plan;
    const parameters = weights ? 0 : plan.weightsBytes;
    this.device.hold(this, parameters + gradients + optimizer, 'The model');
    const { overlap = true } = options;
    const { shape, dtype, parts, share, table, units, degrees, train, recompute } = this;
    const spec = nativeSpec({
      ...{ shape, dtype, parts, share, table, units, plan, degrees, train, recompute, overlap },
      rank: this.rank,
      zero: this.zero,
      ...(weights ? { weights: weights.places } : {}),
    });
    this.native = rethrow(() => new (loadNative().Model)(this.device.native, spec, rank, weights?.memory));
    // What others use as well stays where it is.
    this.state = new ModelState(this.device, this, this.native, { parameters, gradients, optimizer });
    for (const [index, spec] of this.table.entries()) {
      for (const source of spec.sources) {
        const homes = this.homes.get(source.name) ?? [];
        homes.push({ index, spec, source });
        this.homes.set(source.name, homes);
      }
    }
  }

  /** Forms the groups of a rank with others; all of them at the same time. */
  async join(): Promise<void> {
    const { keyValueRanks } = this.share;
    await this.device.run('join', () =>
      this.native.join({ ...this.degrees, keyValueRanks, tiedEnds: this.shape.tied }),
    );
  }

  /** @throws LockstepError STATE_NOT_ON_DEVICE */
  private require(operation: Operation, groups: readonly StateGroup[] = operations[operation][1]): void {
    this.state.require(groups, operations[operation][0]);
  }

  /** What the rank itself would refuse ends the work of all ranks for good: it is refused here. */
  private async run<T>(
    operation: Operation,
    call: () => Promise<Timed<T>>,
    { groups, microBatch }: { groups?: readonly StateGroup[]; microBatch?: number | undefined } = {},
  ): Promise<T> {
    this.require(operation, groups);
    return this.device.run(operation, call, microBatch);
  }

  async load(tensors: readonly FileTensor[]): Promise<void> {
    await this.run('load', () => this.native.load(slicesToLoad(this.table, tensors)));
  }

  async save(tensors: readonly FileTensor[], { copy = false }: { copy?: boolean } = {}): Promise<Saving> {
    const slices = slicesToSave(this.table, this.rank, tensors);
    if (!copy) {
      await this.run('save', () => this.native.save(slices));
      return { copiedBytes: 0, written: Promise.resolve() };
    }
    const snapshot = await this.run('snapshot', () => this.native.snapshot(slices));
    const written = awaitedLater(untimed(() => this.native.save(slices, snapshot.copy)));
    return { copiedBytes: snapshot.bytes, written };
  }

  get states(): readonly ModelState[] {
    return [this.state];
  }

  /**
   * Moves groups of the state; see `moveState`.
   * @throws LockstepError MEMORY_BUDGET, STATE_MOVE_INVALID, GRADIENTS_LIVE, OFFLOAD_FILE
   */
  move(places: StatePlaces): Promise<void> {
    return moveState([{ state: this.state, places }]);
  }

  async forward(batch: TokenBatch, options: ForwardOptions): Promise<ForwardResult> {
    const [result] = await this.runForward(this.planForward([batch], options));
    return result!;
  }

  forwardEach(batches: readonly TokenBatch[], options: Omit<ForwardOptions, 'keep'>): Promise<ForwardResult[]> {
    return Promise.all(batches.map((batch) => this.forward(batch, options)));
  }

  /**
   * @param batches micro-batches that go through the model together; several with `keep` only, none where the rank takes part
   *   in what its replicas do
   * @param kept where activations are kept; default with `keep`: these are the only ones
   * @throws LockstepError STATE_NOT_ON_DEVICE, MODEL_NOT_TRAINED, MEMORY_BUDGET
   */
  planForward(batches: readonly TokenBatch[], options: ForwardOptions, kept?: Kept): NativeForward {
    this.require('forward');
    if (options.keep && !this.train) {
      throw new LockstepError('MODEL_NOT_TRAINED', 'forward with `keep` needs an engine created with `train: true`.');
    }
    const sizes = batches.map(({ lengths }) => wholeSequences(lengths, this.device.rowGrain));
    const only: Kept = { slot: 0, slots: { count: batches.length, sizes }, first: true, more: false };
    const { slot, slots, first, more } = kept ?? only;
    const { share, recompute, dtype } = this;
    const units = this.planUnits(options.keep ? 'training' : 'scoring');
    const begin = units.total;
    const place = { ...share, logits: this.device.logits };
    const training = { recompute, breadthFirst: this.zero >= 2, place, begin, slots };
    const plans = sizes.map((size, i) =>
      options.keep
        ? planTraining(share.shape, dtype, size, { ...training, slot: slot + i })
        : planScoring(share.shape, dtype, size, place, begin),
    );
    const workspaceBytes = Math.max(begin, ...plans.map(({ total }) => total));
    const tokens = batches.reduce((sum, batch) => sum + batch.tokens.length, 0);
    this.device.requireWorkspace(workspaceBytes, `A forward pass over ${tokens} tokens`);
    return {
      passes: batches.map((batch, i) => ({
        tokens: batch.tokens,
        lengths: batch.lengths,
        plan: plans[i]!,
        slot: slot + i,
      })),
      units,
      workspaceBytes,
      // As the sampler rounds it: the trainer's log-probs are the rollout's at every temperature.
      inverseTemperature: Math.fround(1 / Math.fround(options.temperature ?? 1)),
      ...(options.keep ? { keep: { first, more } } : {}),
      outputs: this.share.lastStage ? Object.fromEntries(options.outputs.map((name) => [name, true])) : {},
    };
  }

  private planUnits(use: UnitUse): CallPlan {
    return planUnits(this.table, this.units, this.dtype, this.zero, use);
  }

  /** Of each micro-batch; `microBatch` is the number of the only one. */
  runForward(call: NativeForward, microBatch?: number): Promise<ForwardResult[]> {
    return this.run('forward', () => this.native.forward(call), { microBatch });
  }

  async backward(gradients: TokenGradients): Promise<void> {
    await this.runBackward([{ slot: 0, ...gradients }], { more: false, last: false });
  }

  /** `last`: no other backward follows before the step, so that replicas reduce the gradients. */
  runBackward(
    passes: readonly KeptGradients[],
    options: { more: boolean; last: boolean },
    microBatch?: number,
  ): Promise<void> {
    return this.run('backward', () => this.native.backward({ passes, ...options }), { microBatch });
  }

  async accumulate([own = []]: MicroBatches, options: AccumulateOptions, gradientsOf: GradientsOf): Promise<void> {
    try {
      await accumulateInTurn(this, own, options, (outputs, index) => gradientsOf(outputs, 0, index));
    } catch (error) {
      await Promise.allSettled([this.clearGradients()]);
      throw error;
    }
  }

  /** All ranks together: gradients become those of all replicas, or the rank's pieces of them. */
  async reduceGradients(): Promise<void> {
    await this.run('reduce', () => this.native.reduceGradients());
  }

  async clearGradients(): Promise<void> {
    await this.run('clear', () => this.native.clearGradients());
  }

  async step(options: StepOptions): Promise<StepResult> {
    const { betas, ...rest } = options;
    const call = { ...rest, beta1: betas[0], beta2: betas[1] };
    return { gradientNorm: await this.run('step', () => this.native.step(call)) };
  }

  async generate(requests: readonly GenerateRequest[], options: GenerateOptions): Promise<Generated[]> {
    options.signal?.throwIfAborted();
    if (requests.length === 0) return [];
    const needs = generationNeeds(this.shape, requests, options);
    return this.runGeneration(this.planGeneration(needs, this.pagesFor(needs)), options);
  }

  /** The rank that answers: `options` says what happens on the way. */
  async runGeneration(call: NativeGenerate, options: GenerateOptions): Promise<Generated[]> {
    let thrown: { error: unknown } | undefined;
    const onProgress = options.onProgress;
    const report =
      onProgress === undefined
        ? undefined
        : (progress: GenerateProgress): number[] | undefined => {
            if (thrown) return undefined;
            try {
              return [...(onProgress(progress) ?? [])];
            } catch (error) {
              thrown = { error };
              abort();
              return undefined;
            }
          };
    let handle: ReturnType<NativeModel['generate']> | undefined;
    const abort = (): void => handle?.abort();
    options.signal?.addEventListener('abort', abort, { once: true });
    try {
      const { results, ...statistics } = await this.run('generate', () => {
        handle = this.native.generate(call, report);
        return handle.promise;
      });
      if (thrown) throw thrown.error;
      options.signal?.throwIfAborted();
      this.lastGeneration = statistics;
      if (options.speculation) options.onGuesses?.({ guessed: statistics.guessed, accepted: statistics.accepted });
      return results;
    } finally {
      options.signal?.removeEventListener('abort', abort);
    }
  }

  /** Another rank: it does as that one says. */
  async followGeneration(call: NativeGenerate): Promise<Generated[]> {
    return (await this.run('generate', () => this.native.generate(call).promise)).results;
  }

  /** Pages of keys and values that the rank has room for, at most what is needed. */
  pagesFor({ rows, samples: sequences, pages: needed }: GenerationNeeds): number {
    const { dtype, share } = this;
    const { shape } = share;
    const begin = this.planUnits('generation').total;
    const without = planGeneration(shape, dtype, { rows, sequences, pages: 0 }, share, begin).total;
    const perPage = planGeneration(shape, dtype, { rows, sequences, pages: 1 }, share, begin).total - without;
    return Math.min(needed, Math.max(1, Math.floor((this.device.workspaceBytes - without) / perPage)));
  }

  /** @throws LockstepError STATE_NOT_ON_DEVICE, MEMORY_BUDGET */
  planGeneration({ requests, options, sequences, samples, rows }: GenerationNeeds, pages: number): NativeGenerate {
    this.require('generate');
    const { dtype, share } = this;
    const units = this.planUnits('generation');
    const plan = planGeneration(share.shape, dtype, { rows, sequences: samples, pages }, share, units.total);
    this.device.requireWorkspace(plan.total, `Generation of ${sequences} sequences together`);
    return {
      plan,
      units,
      temperature: options.temperature,
      topP: options.topP,
      topK: options.topK,
      stopTokens: Int32Array.from(options.stopTokens),
      seed: BigInt.asUintN(64, BigInt(options.seed)),
      rows,
      sequences,
      guesses: options.speculation ?? 0,
      guessRows: speculationRows,
      pages,
      requests,
    };
  }

  private home(name: string): { pieces: NativePieces; columns: number; transposed: boolean } {
    const homes = this.homes.get(name);
    if (homes === undefined) {
      throw new LockstepError('MODEL_TENSOR_UNKNOWN', `The model has no tensor '${name}'.`, { name });
    }
    const pieces = homes.flatMap(({ index, source }) =>
      source.pieces.flatMap((piece) => [piece.sourceRow, index, piece.row, piece.rows]),
    );
    return { pieces, columns: homes[0]!.spec.in, transposed: homes[0]!.source.transposed };
  }

  /** Where a rank has rows of a checkpoint tensor; none where other ranks have them all. */
  homesOf(name: string): readonly TensorHome[] {
    return this.homes.get(name) ?? [];
  }

  /** Rows as `pieces` says, of one tensor of the table. */
  async readRows(space: ParameterSpace, columns: number, pieces: NativePieces): Promise<Float32Array> {
    return this.run('read', () => this.native.readRows({ space, columns, pieces }), { groups: this.groupsOf(space) });
  }

  async writeRows(space: ParameterSpace, columns: number, pieces: NativePieces, data: Float32Array): Promise<void> {
    const groups = this.groupsOf(space);
    return this.run('write', () => this.native.writeRows({ space, columns, pieces, data }), { groups });
  }

  /** In bfloat16 the weights that tensors are read from are the masters, which lie with the optimizer's state. */
  private groupsOf(space: ParameterSpace): StateGroup[] {
    if (space === 'gradients') return ['gradients'];
    if (space !== 'weights') return ['optimizer'];
    return this.train && this.dtype === 'bfloat16' ? ['parameters', 'optimizer'] : ['parameters'];
  }

  async readTensor(name: string, space: ParameterSpace = 'weights'): Promise<Float32Array> {
    const { pieces, columns, transposed } = this.home(name);
    const rows = await this.readRows(space, columns, pieces);
    return transposed ? transpose(rows, rows.length / columns, columns) : rows;
  }

  async writeTensor(name: string, data: Float32Array, space: ParameterSpace = 'weights'): Promise<void> {
    const { pieces, columns, transposed } = this.home(name);
    const rows = transposed ? transpose(data, columns, data.length / columns) : data;
    await this.writeRows(space, columns, pieces, rows);
  }

  async publish(): Promise<void> {
    await this.run('publish', () => this.native.publish());
  }

  /** Of what its replicas exchange behind the computation. */
  traffic(): NativeTraffic {
    return rethrow(() => this.native.traffic());
  }

  memory(): EngineMemory {
    return rethrow(() => ({ ...this.native.memory(), ...this.device.memory() }));
  }

  async close(): Promise<void> {
    this.native.close();
    this.device.release(this);
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

/** [rows, columns] to [columns, rows]. */
export function transpose(data: Float32Array, rows: number, columns: number): Float32Array {
  const out = new Float32Array(data.length);
  for (let r = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++) out[c * rows + r] = data[r * columns + c]!;
  }
  return out;
}
