/**
 * One rank's share of a model under tensor and pipeline parallelism: the tensor table, restricted.
 *
 * A stage holds a run of layers (`stageLayers`); the first also the embedding and positions, the last also the final norm and
 * the head. Inside a stage, tensor rank r of t holds parts r P/t .. (r + 1) P/t - 1 of every matrix that is cut: rows of qkv,
 * up, embedding and vocabulary (and of their biases), columns of attentionOut and down. Everything else every rank of the
 * stage holds. Tensors keep their names, so layers count over the whole model.
 *
 * Where t exceeds the G key/value heads, t/G ranks share a head: its k and v rows lie in the part of the first of them, and
 * the others hold a copy in their first part. So every rank's qkv is laid out as that of a model with H/t query heads,
 * max(1, G/t) key/value heads and P/t parts (QkvLayout of native/kernels/kernels.h).
 */
import { LockstepError } from '../errors.js';
import type { ModelShape } from './model-shape.js';
import { coordinatesOf, type Degrees, rankOf } from './parallel.js';
import { type Range, stageLayers } from './stages.js';
import { type Piece, packedElements, type TensorSource, type TensorSpec, tensorTable } from './tensor-table.js';

/** What of the whole tensor a part of the rank's tensor is: these rows, in this order, of these columns. */
export interface Block {
  rows: readonly Range[];
  columns: Range;
}

/**
 * Rows begin .. end - 1 of a rank's tensor that other ranks hold too: `ranks`, global, ascending, of one training replica. The
 * first is the owner: it alone counts in norms and saves.
 *
 * `gradient`: 'equal' when each holder's backward computes the whole gradient from equal inputs; 'partial' when the gradient is
 * the sum over `ranks`, by the tree: of a shared key/value head from each rank's query heads, of the head norms from each
 * rank's heads, of a tied embedding from both ends of the pipeline.
 */
export interface Copies extends Range {
  ranks: readonly number[];
  gradient: 'equal' | 'partial';
}

export interface ShardTensor extends TensorSpec {
  /** One per part, in memory order. */
  blocks: readonly Block[];
  copies: readonly Copies[];
}

const rowsIn = (ranges: readonly Range[]): number => ranges.reduce((sum, { begin, end }) => sum + end - begin, 0);

/** Elements of a block in memory. */
export function blockElements(tensor: Pick<TensorSpec, 'kind'>, block: Block): number {
  const rows = rowsIn(block.rows);
  const columns = block.columns.end - block.columns.begin;
  return tensor.kind === 'vector' ? rows * columns : packedElements(rows, columns);
}

/**
 * The parts of a tensor rank.
 * @throws PARALLEL_INVALID when t is not a power of two up to `parts`
 */
export function rankParts(parts: number, tensorDegree: number, tensor: number): Range {
  if (tensorDegree < 1 || parts % tensorDegree !== 0) {
    const message =
      `parallel.tensor: ${tensorDegree} is not possible with numerics.parts ${parts}: a rank holds a whole number of parts, ` +
      `so it must be a power of two up to ${parts}. Lower it, or raise numerics.parts where the model allows.`;
    throw new LockstepError('PARALLEL_INVALID', message, { key: 'parallel.tensor', received: tensorDegree, parts });
  }
  return { begin: (tensor * parts) / tensorDegree, end: ((tensor + 1) * parts) / tensorDegree };
}

/** Blocks of the parts that a rank holds, and which of its rows others hold too. */
interface Cut {
  blocks: Block[];
  copies: Copies[];
}

class ShardBuilder {
  private readonly at;
  private readonly held: Range;
  private readonly layers: Range;
  /** Global ranks of the rank's tensor group. */
  private readonly group: number[];

  constructor(
    private readonly shape: ModelShape,
    private readonly parts: number,
    private readonly degrees: Degrees,
    rank: number,
    stages: readonly Range[],
  ) {
    this.at = coordinatesOf(rank, degrees);
    this.held = rankParts(parts, degrees.tensor, this.at.tensor);
    this.layers = stages[this.at.pipeline] as Range;
    this.group = Array.from({ length: degrees.tensor }, (_, tensor) => rankOf({ ...this.at, tensor }, degrees));
  }

  build(): ShardTensor[] {
    const table = tensorTable(this.shape, this.parts);
    const held = table.filter((spec) => this.holds(spec.name)).map((spec) => this.shard(spec));
    const { pipeline } = this.degrees;
    if (!this.shape.tied || pipeline === 1) return held;
    if (this.at.pipeline === pipeline - 1) held.push(this.shard(table[0] as TensorSpec));
    return held.map((tensor) => (tensor.tied ? this.untie(tensor) : tensor));
  }

  private holds(name: string): boolean {
    const layer = /^layers\.(\d+)\./.exec(name)?.[1];
    if (layer !== undefined) return Number(layer) >= this.layers.begin && Number(layer) < this.layers.end;
    if (name === 'embed' || name === 'positions') return this.at.pipeline === 0;
    return this.at.pipeline === this.degrees.pipeline - 1;
  }

  private shard(spec: TensorSpec): ShardTensor {
    const { blocks, copies } = this.cut(spec);
    const rows = blocks.flatMap((block) => (spec.split === 'in' ? [] : block.rows));
    const out = spec.split === 'in' ? spec.out : rowsIn(rows);
    const columns = { begin: blocks[0]?.columns.begin ?? 0, end: blocks.at(-1)?.columns.end ?? 0 };
    const sizes = blocks.map((block) =>
      spec.split === 'in' ? block.columns.end - block.columns.begin : rowsIn(block.rows),
    );
    return {
      ...spec,
      out,
      in: columns.end - columns.begin,
      sizes,
      elements: blocks.reduce((sum, block) => sum + blockElements(spec, block), 0),
      sources: spec.sources.map((source) =>
        spec.split === 'in' ? selectColumns(source, columns, spec.in) : selectRows(source, rows),
      ),
      blocks,
      copies,
    };
  }

  private cut(spec: TensorSpec): Cut {
    const columns = { begin: 0, end: spec.in };
    if (spec.split === 'in') {
      const rows = [{ begin: 0, end: spec.out }];
      return { blocks: this.partRanges(spec).map((range) => ({ rows, columns: range })), copies: [] };
    }
    if (spec.split !== 'out') {
      const ranks = this.group;
      const gradient = /(query|key)Norm$/.test(spec.name) ? 'partial' : 'equal';
      const copies: Copies[] = ranks.length === 1 ? [] : [{ begin: 0, end: spec.out, ranks, gradient }];
      return { blocks: [{ rows: [{ begin: 0, end: spec.out }], columns }], copies };
    }
    const ranges = this.partRanges(spec).map((range) => [range]);
    const copies = /\.qkv(Bias)?$/.test(spec.name) ? this.shareKeyValueHead(ranges, spec) : [];
    return { blocks: ranges.map((rows) => ({ rows, columns })), copies };
  }

  /** Rows (columns of a matrix cut along them) of the whole tensor in each part of the rank. */
  private partRanges(spec: TensorSpec): Range[] {
    const begins = [0];
    for (const size of spec.sizes) begins.push((begins.at(-1) as number) + size);
    const { begin, end } = this.held;
    return Array.from({ length: end - begin }, (_, i) => ({
      begin: begins[begin + i] as number,
      end: begins[begin + i + 1] as number,
    }));
  }

  /** Where t exceeds G: the rank's first part gets the rows of its key/value head, unless it owns them. */
  private shareKeyValueHead(ranges: Range[][], whole: TensorSpec): Copies[] {
    const { heads, keyValueHeads, headWidth } = this.shape;
    const sharers = this.degrees.tensor / keyValueHeads;
    if (sharers <= 1) return [];
    const owner = this.at.tensor - (this.at.tensor % sharers);
    const queryRows = (heads / this.parts) * headWidth;
    if (owner !== this.at.tensor) {
      const ownerPart = rankParts(this.parts, this.degrees.tensor, owner).begin;
      const begin = whole.sizes.slice(0, ownerPart).reduce((sum, size) => sum + size, 0) + queryRows;
      ranges[0]?.push({ begin, end: begin + 2 * headWidth });
    }
    const ranks = this.group.slice(owner, owner + sharers);
    return [{ begin: queryRows, end: queryRows + 2 * headWidth, ranks, gradient: 'partial' }];
  }

  /** A tied embedding on two stages: the lookup's on the first, the projection's on the last; one accumulator each. */
  private untie(tensor: ShardTensor): ShardTensor {
    const { pipeline } = this.degrees;
    const ranks = [0, pipeline - 1].map((stage) => rankOf({ ...this.at, pipeline: stage }, this.degrees));
    return { ...tensor, tied: false, copies: [{ begin: 0, end: tensor.out, ranks, gradient: 'partial' }] };
  }
}

/** Those rows of the engine's tensor, in that order, become rows 0, 1, ... */
function selectRows(source: TensorSource, ranges: readonly Range[]): TensorSource {
  const pieces: Piece[] = [];
  let row = 0;
  for (const range of ranges) {
    for (const piece of source.pieces) {
      const begin = Math.max(range.begin, piece.row);
      const end = Math.min(range.end, piece.row + piece.rows);
      if (begin >= end) continue;
      const selected = {
        sourceRow: piece.sourceRow + begin - piece.row,
        rows: end - begin,
        row: row + begin - range.begin,
      };
      const last = pieces.at(-1);
      const joins = last && last.sourceRow + last.rows === selected.sourceRow && last.row + last.rows === selected.row;
      if (joins) last.rows += selected.rows;
      else pieces.push(selected);
    }
    row += range.end - range.begin;
  }
  return { ...source, pieces };
}

function selectColumns(source: TensorSource, { begin, end }: Range, whole: number): TensorSource {
  return end - begin === whole ? source : { ...source, columns: { begin, count: end - begin } };
}

/**
 * The tensors of one rank, in the order of the forward pass. `parts` comes from `resolveParts`; ranks of different data
 * coordinates hold the same. `stages`: the layers of each stage, those of `stageLayers` unless given.
 * @throws PARALLEL_INVALID when t is not a power of two up to `parts` or p exceeds the layers; RANK_INVALID
 */
export function shardTable(
  shape: ModelShape,
  parts: number,
  degrees: Degrees,
  rank: number,
  stages: readonly Range[] = stageLayers(shape.layers, degrees.pipeline),
): ShardTensor[] {
  return new ShardBuilder(shape, parts, degrees, rank, stages).build();
}
