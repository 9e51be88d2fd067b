/**
 * The one place that walks epochs x mini-batches x micro-batches: forward, the loss's gradient per token, backward, step.
 * Normalisers are those of the whole mini-batch, so how it is cut into micro-batches changes no number.
 */
import { callSignal } from '../cluster/call-context.js';
import { evenRanges, microBatches, type RowRange } from '../data/batch.js';
import { shuffledRows } from '../data/sampler.js';
import type { Engine, ForwardOutput, StepOptions, TokenGradients } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import { type Coupling, type Experience, evaluateLoss, type Loss, outputsOf, totalsOf } from '../losses/loss.js';
import type { Totals } from '../losses/selection.js';
import { mean } from '../losses/statistics.js';
import { type ForwardSettings, offsets } from './batches.js';
import type { Canary } from './canary.js';

/** Another batch whose loss is part of the same steps: one sum of gradients, each loss normalised by its own totals. */
export interface Addition {
  readonly experience: Experience;
  readonly loss: Loss;
  /** Of its log-probs; default 1, whatever the main batch's is. */
  readonly temperature?: number | undefined;
}

export interface LearnOptions extends ForwardSettings {
  epochs: number;
  miniBatches: number;
  /** Each mini-batch takes its share of their rows, in order. */
  also?: readonly Addition[] | undefined;
  /** AdamW with this step's learning rate; `step` is that of the first update made here. */
  optimizer: StepOptions;
  /** Order of the rows in epoch e is that of pass `firstPass + e`; without it they stay in order. */
  shuffle?: { seed: number; firstPass: number };
  /** Compares the first mini-batch's log-probs before any update. */
  canary?: Canary;
}

export interface LearnResult {
  /** Mean over the mini-batches of the loss at the weights before each one's update. */
  loss: number;
  /** Mean over the updates of the gradient norm before clipping. */
  gradientNorm: number;
  /** Means of what the losses report, over the mini-batches that report it. */
  statistics: Record<string, number>;
  updates: number;
}

/**
 * Ends between two micro-batches when its call is released, with an update half done.
 * @throws LockstepError LOSS_NOT_FINITE before the update that it would spoil; MISMATCH from the canary; the reason of `callSignal()`.
 */
export async function learn(
  engine: Engine,
  batch: Experience,
  loss: Loss,
  options: LearnOptions,
): Promise<LearnResult> {
  const { epochs, optimizer } = options;
  const results: (LossValue & { gradientNorm: number })[] = [];
  for (let epoch = 0; epoch < epochs; epoch++) {
    const miniBatches = miniBatchRows(batch, loss.couples, epoch, options);
    for (const [m, rows] of miniBatches.entries()) {
      const canary = results.length === 0 ? options.canary : undefined;
      const also = sharesOf(options.also ?? [], m, miniBatches.length);
      const main = { experience: takeRows(batch, rows), loss, temperature: options.temperature };
      const parts: LossValue[] = [];
      for (const [i, part] of [main, ...also].entries()) {
        const check = canary && i === 0 ? { canary, rows } : undefined;
        parts.push(await accumulate(engine, part, options, check, i === also.length));
      }
      const { gradientNorm } = await engine.step({ ...optimizer, step: optimizer.step + results.length });
      checkFinite('gradient norm', gradientNorm);
      results.push({ ...addUp(parts), gradientNorm });
    }
  }
  return {
    loss: mean(results.map((result) => result.value)),
    gradientNorm: mean(results.map((result) => result.gradientNorm)),
    statistics: averages(results.map((result) => result.statistics)),
    updates: results.length,
  };
}

/** The loss and its statistics at the present weights, without learning. */
export async function computeLoss(
  engine: Engine,
  batch: Experience,
  loss: Loss,
  { microTokens, temperature = 1 }: ForwardSettings,
): Promise<{ loss: number; statistics: Record<string, number>; totals: Totals }> {
  const totals = totalsOf(batch);
  const parts: LossValue[] = [];
  for (const part of microBatchesOf(batch, loss.couples, microTokens)) {
    const outputs = await engine.forward(part, { outputs: outputsOf(loss) as ForwardOutput[], temperature });
    const result = evaluateLoss(loss, part, outputs, totals);
    parts.push({ value: result.loss, statistics: result.statistics });
  }
  const { value, statistics } = addUp(parts);
  return { loss: value, statistics, totals };
}

interface LossValue {
  value: number;
  statistics: Record<string, number>;
}

/** The rows of each addition that mini-batch m of `count` takes; those without rows are left out. */
function sharesOf(also: readonly Addition[], m: number, count: number): Addition[] {
  return also.flatMap((addition) => {
    const { experience, loss } = addition;
    const ranges = evenRanges(experience.lengths.length, count, unitSize(experience, loss.couples));
    const share = takeRange(experience, ranges[m]!);
    return share.lengths.length > 0 ? [{ ...addition, experience: share }] : [];
  });
}

/** Adds the gradients of one mini-batch to the engine's accumulators; after the `final` one comes the step. */
async function accumulate(
  engine: Engine,
  { experience: batch, loss, temperature = 1 }: Addition,
  { microTokens }: LearnOptions,
  check: { canary: Canary; rows: Int32Array } | undefined,
  final: boolean,
): Promise<LossValue> {
  const totals = totalsOf(batch);
  const outputs = outputsOf(loss) as ForwardOutput[];
  const ranges = evenRanges(batch.lengths.length, engine.replicas, unitSize(batch, loss.couples));
  const shards = ranges.map((rows) => takeRange(batch, rows));
  const microBatches = shards.map((shard) => microBatchesOf(shard, loss.couples, microTokens));
  const signal = callSignal();
  const firstRows = rowsBefore(microBatches);
  const parts = microBatches.map((own): LossValue[] => own.map(() => ({ value: 0, statistics: {} })));
  await engine.accumulate(microBatches, { outputs, temperature, final }, (result, replica, index) => {
    signal?.throwIfAborted();
    const part = microBatches[replica]![index]!;
    const row = firstRows[replica]![index]!;
    if (check) check.canary.compare(part, check.rows.subarray(row, row + part.lengths.length), result.logprobs!);
    const { loss: value, statistics, gradients } = evaluateLoss(loss, part, result, totals);
    checkFinite('loss', value);
    parts[replica]![index] = { value, statistics };
    return toFloat32(gradients);
  });
  return addUp(parts.flat());
}

/** Rows of a batch before each micro-batch. */
function rowsBefore(microBatches: readonly (readonly Experience[])[]): number[][] {
  let row = 0;
  return microBatches.map((own) =>
    own.map(({ lengths }) => {
      const first = row;
      row += lengths.length;
      return first;
    }),
  );
}

/** Keeps these draws apart from those of the data's order. */
const orderStream = 0x6d696e69;

/** Rows of each mini-batch of an epoch; rows that a loss couples stay together and in order. */
function miniBatchRows(
  batch: Experience,
  couples: Coupling,
  epoch: number,
  { miniBatches, shuffle }: LearnOptions,
): Int32Array[] {
  const size = unitSize(batch, couples);
  const units = batch.lengths.length / size;
  const order = shuffle
    ? shuffledRows(units, shuffle.seed ^ orderStream, shuffle.firstPass + epoch)
    : Uint32Array.from({ length: units }, (_, i) => i);
  const parts = Math.min(miniBatches, units);
  return Array.from({ length: parts }, (_, m) => {
    const own = order.subarray(Math.floor((m * units) / parts), Math.floor(((m + 1) * units) / parts));
    return Int32Array.from({ length: own.length * size }, (_, i) => own[Math.floor(i / size)]! * size + (i % size));
  });
}

function unitSize(batch: Experience, couples: Coupling): number {
  return couples === 'pair' ? 2 : couples === 'group' ? (batch.groupSize ?? 1) : 1;
}

function takeRange(batch: Experience, { begin, end }: RowRange): Experience {
  if (begin === 0 && end === batch.lengths.length) return batch;
  return takeRows(
    batch,
    Int32Array.from({ length: end - begin }, (_, i) => begin + i),
  );
}

function microBatchesOf(batch: Experience, couples: Coupling, microTokens: number): Experience[] {
  const spans = microBatches(batch.lengths, microTokens, { group: unitSize(batch, couples) });
  return spans.map((span) => takeRange(batch, span));
}

/** The given rows of a batch, in that order, with their share of every per-token array. */
export function takeRows(batch: Experience, rows: Int32Array): Experience {
  const starts = offsets(batch.lengths);
  const lengths = Int32Array.from(rows, (row) => batch.lengths[row]!);
  const total = lengths.reduce((sum, length) => sum + length, 0);
  const take = (source: ArrayLike<number>): Float64Array => {
    const taken = new Float64Array(total);
    let at = 0;
    for (const row of rows) for (let t = starts[row]!; t < starts[row + 1]!; t++) taken[at++] = source[t]!;
    return taken;
  };
  return {
    tokens: Int32Array.from(take(batch.tokens)),
    lengths,
    mask: take(batch.mask),
    columns: Object.fromEntries(Object.entries(batch.columns).map(([name, column]) => [name, take(column)])),
    ...(batch.groupSize === undefined ? {} : { groupSize: batch.groupSize }),
  };
}

function toFloat32(gradients: { readonly [name: string]: Float64Array | undefined }): TokenGradients {
  return Object.fromEntries(
    Object.entries(gradients).flatMap(([name, values]) => (values ? [[name, Float32Array.from(values)]] : [])),
  );
}

/** Losses are additive over micro-batches: their normalisers are the mini-batch's. */
function addUp(parts: readonly LossValue[]): LossValue {
  const statistics: Record<string, number> = {};
  let value = 0;
  for (const part of parts) {
    value += part.value;
    for (const [name, amount] of Object.entries(part.statistics)) statistics[name] = (statistics[name] ?? 0) + amount;
  }
  return { value, statistics };
}

/** The mean of each name over the parts that have it. */
function averages(parts: readonly Record<string, number>[]): Record<string, number> {
  const names = new Set(parts.flatMap((part) => Object.keys(part)));
  const valuesOf = (name: string) => parts.flatMap((part) => part[name] ?? []);
  return Object.fromEntries(Array.from(names, (name) => [name, mean(valuesOf(name))]));
}

function checkFinite(what: string, value: number): void {
  if (Number.isFinite(value)) return;
  throw new LockstepError(
    'LOSS_NOT_FINITE',
    `the ${what} is ${value}; lower optimizer.learningRate, check the data and the reward, or resume from an earlier checkpoint`,
    { value },
  );
}
