/** What a loss is, and its value and per-token gradients on a batch. */
import type { TokenBatch } from '../data/batch.js';
import { LockstepError } from '../errors.js';
import { type Numbers, type Selection, select, type Totals } from './selection.js';
import { gradients, type Scalar, TokenArray } from './tokens.js';

/** What the engine returns per token and takes gradients of. */
export const outputNames = ['logprobs', 'entropies', 'values'] as const;
export type OutputName = (typeof outputNames)[number];
export type Outputs = { readonly [Name in OutputName]?: Numbers | undefined };

/**
 * Which rows must share a micro-batch because the loss relates them: `token` and `sequence` none, `pair` rows 2i and
 * 2i+1, `group` the rows of one prompt.
 */
export type Coupling = 'token' | 'sequence' | 'pair' | 'group';

/** The per-token values that a formula reads: model outputs as variables, columns of the batch as constants. */
export type LossInputs<Column extends string> = { readonly [Name in Column]: TokenArray };

/**
 * A loss is a formula over per-token values. It must be pure, must not branch on anything but its settings, and divides
 * by `Totals` only, so that the sum over micro-batches and ranks is the value of the whole mini-batch.
 */
export interface Loss<Column extends string = string> {
  readonly couples: Coupling;
  /** Model outputs and batch columns that the formula reads. */
  readonly reads: readonly Column[];
  formula(t: LossInputs<Column>): Scalar;
  /** Numbers to report beside the loss; additive over micro-batches like the loss itself. */
  statistics?(t: LossInputs<Column>): Readonly<Record<string, Scalar>>;
}

/**
 * Packed sequences with what a loss needs to know of them. All per-token arrays follow the engine's convention: entry t
 * belongs to the prediction of token t+1 from tokens 0..t of the same sequence. `logprobs[t]` = log p(token t+1),
 * `entropies[t]` = entropy of that distribution, `values[t]` = V(tokens 0..t), so the value that belongs to the action
 * "token t+1" is `values[t]`. The last position of a sequence predicts nothing; its value is the score of the sequence.
 */
export interface LossBatch {
  /** Tokens of each sequence. */
  readonly lengths: Numbers;
  /** Over the packed tokens: not 0 where the prediction is learned. */
  readonly mask: Numbers;
  /** Constants over the packed tokens, by name. */
  readonly columns: Readonly<Record<string, Numbers>>;
}

/** Sequences to learn from, with the columns that the loss reads; arrays are over the packed tokens. */
export interface Experience extends TokenBatch, LossBatch {
  readonly tokens: Int32Array;
  readonly lengths: Int32Array;
  /** So many rows follow each other that belong together, for losses that couple them; default 1. */
  readonly groupSize?: number;
}

export interface LossResult {
  readonly loss: number;
  readonly statistics: Record<string, number>;
  /** d loss / d output per packed token, for the outputs that the loss depends on. */
  readonly gradients: { readonly [Name in OutputName]?: Float64Array };
}

/** The counts of one batch; `addTotals` makes those of a mini-batch out of its parts. */
export const totalsOf = (batch: LossBatch): Totals => select(batch.lengths, batch.mask).totals;

/**
 * Evaluates a loss on one micro-batch. `totals` are those of the whole mini-batch (default: of this batch). Throws
 * `LOSS_COLUMN` when the batch or the model's outputs lack what the loss reads, `LOSS_SHAPE` on arrays of a wrong length.
 */
export function evaluateLoss(loss: Loss, batch: LossBatch, outputs: Outputs, totals?: Totals): LossResult {
  const selection = select(batch.lengths, batch.mask, totals);
  const inputs = lossInputs(loss, batch, outputs, selection);
  const result = loss.formula(inputs);
  const leaves = outputNames.filter((name) => loss.reads.includes(name));
  const derivatives = gradients(
    result,
    leaves.map((name) => inputs[name]!),
  );
  const statistics = Object.entries(loss.statistics?.(inputs) ?? {}).map(([name, { value }]) => [name, value] as const);
  return {
    loss: result.value,
    statistics: Object.fromEntries(statistics),
    gradients: Object.fromEntries(
      leaves.flatMap((name, i) => (derivatives[i] ? [[name, derivatives[i]] as const] : [])),
    ),
  };
}

/** The model outputs that a loss reads: what a forward pass must return for it. */
export const outputsOf = (loss: Loss): OutputName[] => outputNames.filter((name) => loss.reads.includes(name));

function lossInputs(loss: Loss, batch: LossBatch, outputs: Outputs, selection: Selection): LossInputs<string> {
  const variables: Readonly<Record<string, Numbers | undefined>> = outputs;
  return Object.fromEntries(
    loss.reads.map((name) => {
      const isOutput = (outputNames as readonly string[]).includes(name);
      const packed = isOutput ? variables[name] : batch.columns[name];
      if (!packed) {
        const present = Object.keys(isOutput ? outputs : batch.columns).join(', ') || 'none';
        throw new LockstepError(
          'LOSS_COLUMN',
          `The loss reads "${name}", but the ${isOutput ? 'model outputs' : 'batch'} hold: ${present}. Add it to the ${
            isOutput ? 'forward pass' : "batch's columns"
          }.`,
          { column: name },
        );
      }
      return [name, isOutput ? TokenArray.leaf(selection, packed) : TokenArray.constant(selection, packed)];
    }),
  );
}
