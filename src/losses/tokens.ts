/**
 * Reverse-mode automatic differentiation over per-token arrays.
 *
 * A loss is written over three kinds of values: `TokenArray` (one number per learned token of a packed batch),
 * `SequenceArray` (one per sequence) and `Scalar`. Tokens that the mask leaves out are not stored at all, so whatever
 * they hold (NaN included) cannot reach a value or a gradient, and an element that no later value selected receives
 * no gradient whatever its local derivative. Arithmetic is IEEE double precision; formulas are total.
 *
 * Branches at equality: `min`, `max` and `clip` choose `this`; `abs` has derivative 0 at 0. A NaN operand is chosen.
 */
import { LockstepError } from '../errors.js';
import { collect, compact, expand, type Numbers, type Selection, spread } from './selection.js';

type Node = TokenArray | SequenceArray | Scalar;
/** Adds the upstream gradient times the local derivative into each parent's gradient (undefined: not wanted). */
type Pull = (upstream: Float64Array, into: readonly (Float64Array | undefined)[]) => void;

/** A leaf is differentiated, a constant is not; every other value knows what it was made of. */
type Origin = 'leaf' | 'constant' | { readonly parents: readonly Node[]; readonly pull: Pull };

let created = 0;

abstract class Differentiable<Self extends Differentiable<Self>> {
  /** Values are numbered as they are made: a value's parents have smaller numbers. */
  readonly order = created++;
  /** Whether a leaf is among the ancestors, or this is one. */
  readonly tracked: boolean;

  constructor(
    readonly data: Float64Array,
    readonly origin: Origin,
  ) {
    this.tracked = origin === 'leaf' || (origin !== 'constant' && origin.parents.some((parent) => parent.tracked));
  }

  protected abstract like(data: Float64Array, origin: Origin): Self;

  exp(): Self {
    return this.unary(Math.exp, (_, y) => y);
  }
  log(): Self {
    return this.unary(Math.log, (x) => 1 / x);
  }
  negate(): Self {
    return this.times(-1);
  }
  square(): Self {
    return this.unary(
      (x) => x * x,
      (x) => 2 * x,
    );
  }
  abs(): Self {
    return this.unary(Math.abs, Math.sign);
  }
  /** 1 / (1 + e^-x). */
  sigmoid(): Self {
    return this.unary(sigmoid, (_, y) => y * (1 - y));
  }
  /** log(1 / (1 + e^-x)), without overflow for any x. */
  logSigmoid(): Self {
    return this.unary(
      (x) => Math.min(x, 0) - Math.log1p(Math.exp(-Math.abs(x))),
      (x) => sigmoid(-x),
    );
  }

  plus(other: Self | number): Self {
    return this.binary(
      other,
      (a, b) => a + b,
      () => [1, 1],
    );
  }
  minus(other: Self | number): Self {
    return this.binary(
      other,
      (a, b) => a - b,
      () => [1, -1],
    );
  }
  times(other: Self | number): Self {
    return this.binary(
      other,
      (a, b) => a * b,
      (a, b) => [b, a],
    );
  }
  divide(other: Self | number): Self {
    return this.binary(
      other,
      (a, b) => a / b,
      (a, b) => [1 / b, -a / (b * b)],
    );
  }
  min(other: Self | number): Self {
    return this.choose(other, (a, b) => a <= b || Number.isNaN(a));
  }
  max(other: Self | number): Self {
    return this.choose(other, (a, b) => a >= b || Number.isNaN(a));
  }
  /** min(max(x, low), high); the gradient is that of the branch that is chosen. */
  clip(low: Self | number, high: Self | number): Self {
    return this.max(low).min(high);
  }
  /** This where the condition is not 0, the other elsewhere. */
  where(condition: Self, otherwise: Self | number): Self {
    const a = this.data;
    const b = this.operand(otherwise);
    const chosen = this.operand(condition);
    return this.like(
      a.map((x, i) => (chosen(i) ? x : b(i))),
      {
        parents: nodes(this, otherwise),
        pull: (upstream, [intoA, intoB]) => {
          for (let i = 0; i < upstream.length; i++) {
            const into = chosen(i) ? intoA : intoB;
            if (into) into[i]! += upstream[i]!;
          }
        },
      },
    );
  }
  /** 1 where this is greater, else 0; a constant. */
  greaterThan(other: Self | number): Self {
    const b = this.operand(other);
    return this.like(
      this.data.map((x, i) => (x > b(i) ? 1 : 0)),
      'constant',
    );
  }
  /** 1 where this is smaller, else 0; a constant. */
  lessThan(other: Self | number): Self {
    const b = this.operand(other);
    return this.like(
      this.data.map((x, i) => (x < b(i) ? 1 : 0)),
      'constant',
    );
  }

  /** The same numbers as a constant. */
  stopGradient(): Self {
    return this.like(this.data, 'constant');
  }
  /** Straight-through: these numbers with the gradient of `other`. */
  withGradientOf(other: Self): Self {
    this.operand(other);
    const pull: Pull = (upstream, [into]) => {
      if (into) for (let i = 0; i < upstream.length; i++) into[i]! += upstream[i]!;
    };
    return this.like(this.data, { parents: nodes(other), pull });
  }

  sum(): Scalar {
    let total = 0;
    for (const x of this.data) total += x;
    const pull: Pull = ([g], [into]) => {
      if (into) for (let i = 0; i < into.length; i++) into[i]! += g!;
    };
    return new Scalar(Float64Array.of(total), { parents: nodes(this), pull });
  }

  private unary(f: (x: number) => number, derivative: (x: number, y: number) => number): Self {
    const x = this.data;
    const y = x.map((value) => f(value));
    return this.like(y, {
      parents: nodes(this),
      pull: (upstream, [into]) => {
        if (!into) return;
        for (let i = 0; i < upstream.length; i++) {
          const g = upstream[i]!;
          if (g !== 0) into[i]! += g * derivative(x[i]!, y[i]!);
        }
      },
    });
  }

  private binary(
    other: Self | number,
    f: (a: number, b: number) => number,
    derivatives: (a: number, b: number) => readonly [number, number],
  ): Self {
    const a = this.data;
    const b = this.operand(other);
    return this.like(
      a.map((x, i) => f(x, b(i))),
      {
        parents: nodes(this, other),
        pull: (upstream, [intoA, intoB]) => {
          for (let i = 0; i < upstream.length; i++) {
            const g = upstream[i]!;
            if (g === 0) continue;
            const [da, db] = derivatives(a[i]!, b(i));
            if (intoA && da !== 0) intoA[i]! += g * da;
            if (intoB && db !== 0) intoB[i]! += g * db;
          }
        },
      },
    );
  }

  private choose(other: Self | number, takesThis: (a: number, b: number) => boolean): Self {
    return this.binary(
      other,
      (a, b) => (takesThis(a, b) ? a : b),
      (a, b) => (takesThis(a, b) ? [1, 0] : [0, 1]),
    );
  }

  private operand(other: Self | number): (i: number) => number {
    if (typeof other === 'number') return () => other;
    const { data } = other;
    if (data.length !== this.data.length) {
      throw new LockstepError(
        'LOSS_SHAPE',
        `A formula combines ${this.data.length} numbers with ${data.length}; operands need the same tokens or sequences.`,
        { expected: this.data.length, received: data.length },
      );
    }
    return (i) => data[i]!;
  }
}

/** One number per learned token of a packed batch. */
export class TokenArray extends Differentiable<TokenArray> {
  constructor(
    readonly selection: Selection,
    data: Float64Array,
    origin: Origin,
  ) {
    super(data, origin);
  }

  /** The learned entries of a packed array, as a variable of the loss. Throws `LOSS_SHAPE` on a wrong length. */
  static leaf(selection: Selection, packed: Numbers): TokenArray {
    return new TokenArray(selection, compact(selection, packed), 'leaf');
  }
  /** The learned entries of a packed array, as constants (advantages, old log-probs, ...). */
  static constant(selection: Selection, packed: Numbers): TokenArray {
    return new TokenArray(selection, compact(selection, packed), 'constant');
  }

  protected like(data: Float64Array, origin: Origin): TokenArray {
    return new TokenArray(this.selection, data, origin);
  }

  /** Σ over the learned tokens of each sequence; 0 where there are none. */
  sumBySequence(): SequenceArray {
    const { starts } = this.selection;
    const pull: Pull = (upstream, [into]) => {
      if (into) spread(starts, upstream, into);
    };
    const data = collect(starts, this.data, new Float64Array(starts.length - 1));
    return new SequenceArray(this.selection, data, { parents: [this], pull });
  }

  /** Mean over the learned tokens of each sequence; 0 where there are none. */
  meanBySequence(): SequenceArray {
    const { starts } = this.selection;
    const counts = Float64Array.from({ length: starts.length - 1 }, (_, b) => Math.max(starts[b + 1]! - starts[b]!, 1));
    return this.sumBySequence().divide(new SequenceArray(this.selection, counts, 'constant'));
  }

  /** The packed array, 0 at positions that are not learned. */
  expand(): Float64Array {
    return expand(this.selection, this.data);
  }
}

/** One number per sequence. */
export class SequenceArray extends Differentiable<SequenceArray> {
  constructor(
    /** Where the sequences' tokens are; undefined after `gather`. */
    readonly selection: Selection | undefined,
    data: Float64Array,
    origin: Origin,
  ) {
    super(data, origin);
  }

  protected like(data: Float64Array, origin: Origin): SequenceArray {
    return new SequenceArray(this.selection, data, origin);
  }

  /** Element i is that of sequence `rows[i]`: the chosen answers of pairs, the members of groups. */
  gather(rows: Numbers): SequenceArray {
    const data = Float64Array.from(rows, (row) => this.data[row]!);
    const pull: Pull = (upstream, [into]) => {
      if (into) for (let i = 0; i < upstream.length; i++) into[rows[i]!]! += upstream[i]!;
    };
    return new SequenceArray(undefined, data, { parents: [this], pull });
  }

  /** Each sequence's number at each of its learned tokens. Throws `LOSS_SHAPE` after `gather`. */
  overTokens(): TokenArray {
    const { selection } = this;
    if (!selection) {
      throw new LockstepError('LOSS_SHAPE', 'Gathered sequences have no tokens; call overTokens() before gather().');
    }
    const { starts } = selection;
    const data = new Float64Array(selection.positions.length);
    spread(starts, this.data, data);
    const pull: Pull = (upstream, [into]) => {
      if (into) collect(starts, upstream, into);
    };
    return new TokenArray(selection, data, { parents: [this], pull });
  }
}

/** One number: a loss, a normalised sum. */
export class Scalar extends Differentiable<Scalar> {
  get value(): number {
    return this.data[0]!;
  }

  protected like(data: Float64Array, origin: Origin): Scalar {
    return new Scalar(data, origin);
  }
}

/**
 * d result / d leaf for each leaf, packed as the leaf was: 0 at positions that are not learned, and undefined for a leaf
 * that the result does not depend on.
 */
export function gradients(result: Scalar, leaves: readonly TokenArray[]): (Float64Array | undefined)[] {
  const pending = new Map<Node, Float64Array>();
  pending.set(result, Float64Array.of(1));
  for (const node of ancestors(result)) {
    const upstream = pending.get(node)!;
    if (typeof node.origin === 'string') continue;
    const into = node.origin.parents.map((parent) => {
      if (!parent.tracked) return undefined;
      const gradient = pending.get(parent) ?? new Float64Array(parent.data.length);
      pending.set(parent, gradient);
      return gradient;
    });
    node.origin.pull(upstream, into);
  }
  return leaves.map((leaf) => {
    const gradient = pending.get(leaf);
    return gradient && expand(leaf.selection, gradient);
  });
}

/** The tracked values that the result is made of, latest first. */
function ancestors(result: Scalar): Node[] {
  const found = new Set<Node>();
  const open: Node[] = result.tracked ? [result] : [];
  for (let node = open.pop(); node; node = open.pop()) {
    if (found.has(node)) continue;
    found.add(node);
    if (typeof node.origin !== 'string') open.push(...node.origin.parents.filter((parent) => parent.tracked));
  }
  return [...found].sort((a, b) => b.order - a.order);
}

function sigmoid(x: number): number {
  const e = Math.exp(-Math.abs(x));
  return (x >= 0 ? 1 : e) / (1 + e);
}

function nodes(...values: unknown[]): Node[] {
  return values.filter((value) => typeof value !== 'number') as Node[];
}
