/**
 * How a call of a worker group spreads its argument and gathers answers. A transfer protocol is a (distribute, collect) pair
 * (HybridFlow [2409.19256], section 4.1); those of Table 3 are one function of a routing, which is data.
 */
import { LockstepError } from '../errors.js';
import { type Degrees, type GenerationDegrees, worldSize } from '../layout/parallel.js';
import { rowCount, Shards } from './rows.js';

/** The ranks of a group; routings are functions of this. */
export interface RankLayout {
  readonly layout: Degrees;
  /** Of a group that also generates, inside each training replica. */
  readonly generation?: GenerationDegrees;
}

export interface Routing {
  /** Shard of the batch that each rank receives, from 0 without gaps. */
  readonly shardOfRank: readonly number[];
  /** Whose answers are collected, in the order of shards, then ranks. */
  readonly answers: readonly boolean[];
}

/** A (distribute, collect) pair. Write one by hand for what no routing says. */
export interface Protocol<Argument = unknown, Part = unknown, Answer = unknown, Result = unknown> {
  /** First argument of a call to one per rank. Not called when the call has no arguments. */
  distribute(argument: Argument, ranks: RankLayout): readonly Part[];
  /** Answers by rank, undefined where `answers` is false, to the result of the call. */
  collect(answers: readonly Answer[], ranks: RankLayout): Result;
  /** Ranks whose answers `collect` reads: the others' stay where they are. Default: all. */
  answers?(ranks: RankLayout): readonly boolean[];
  /** Row of the argument with which each rank's part begins, where parts are rows. Default: 0. */
  firstRows?(parts: readonly Part[], ranks: RankLayout): readonly number[];
  /** What `collect` joins, in parts: another group takes it so. Default: what `collect` gives. */
  parts?(answers: readonly Answer[], ranks: RankLayout): unknown;
}

/** `batch`: rows, one value for all shards. `list`: one value for each. */
export type Form = 'batch' | 'list';

export interface RoutedProtocol<Takes extends Form, Gives extends Form> extends Protocol {
  readonly takes: Takes;
  readonly gives: Gives;
  answers(ranks: RankLayout): readonly boolean[];
}

/**
 * The pair of a routing. It cuts a batch by rows, or takes a list with an entry per shard; it joins the rows of the answers, or
 * gives their list. Errors: `PROTOCOL_INVALID` for a routing that does not fit the ranks or, joining, has not one answer per shard.
 */
export function routed<Takes extends Form, Gives extends Form>(
  takes: Takes,
  gives: Gives,
  route: (ranks: RankLayout) => Routing,
): RoutedProtocol<Takes, Gives> {
  const routeOf = (ranks: RankLayout) => checked(route(ranks), worldSize(ranks.layout), gives);
  const listOf = (answers: readonly unknown[], ranks: RankLayout) =>
    answering(routeOf(ranks)).map((rank) => answers[rank]);
  return {
    takes,
    gives,
    answers: (ranks) => routeOf(ranks).answers,
    distribute: (argument, ranks) => {
      const { shardOfRank } = routeOf(ranks);
      const count = Math.max(...shardOfRank) + 1;
      const parts = takes === 'list' ? listed(argument, count) : shardsOf(argument).cut(count);
      return shardOfRank.map((shard) => parts[shard]);
    },
    // The entries of a list are whole values.
    firstRows: (parts, ranks) => (takes === 'list' ? parts.map(() => 0) : firstRowsOf(parts, routeOf(ranks))),
    collect: (answers, ranks) =>
      gives === 'list' ? listOf(answers, ranks) : new Shards(listOf(answers, ranks)).join(),
    parts: (answers, ranks) => (gives === 'list' ? listOf(answers, ranks) : new Shards(listOf(answers, ranks))),
  };
}

/** By rank: rows of the shards before its own. */
function firstRowsOf(parts: readonly unknown[], { shardOfRank }: Routing): number[] {
  const starts = [0];
  for (let shard = 0; shard < Math.max(...shardOfRank); shard++) {
    starts.push(starts[shard]! + rowCount(parts[shardOfRank.indexOf(shard)]));
  }
  return shardOfRank.map((shard) => starts[shard]!);
}

function shardsOf(argument: unknown): Shards<unknown> {
  return argument instanceof Shards ? argument : new Shards([argument]);
}

function listed(argument: unknown, count: number): readonly unknown[] {
  const list: unknown = argument instanceof Shards ? argument.parts : argument;
  if (Array.isArray(list) && list.length === count) return list;
  throw new LockstepError(
    'BATCH_INVALID',
    `expected a list of ${count} arguments, one for each shard, and received ` +
      `${Array.isArray(list) ? `one of ${list.length}` : `a value of type ${typeof list}`}.`,
  );
}

/** Ranks that answer, by shard; ranks of one shard in their order. */
function answering({ shardOfRank, answers }: Routing): number[] {
  const ranks = answers.flatMap((answer, rank) => (answer ? [rank] : []));
  return ranks.sort((a, b) => shardOfRank[a]! - shardOfRank[b]! || a - b);
}

function checked(routing: Routing, world: number, gives: Form): Routing {
  const { shardOfRank, answers } = routing;
  const refuse = (why: string) => new LockstepError('PROTOCOL_INVALID', `The routing ${why}.`, { ...routing });
  if (shardOfRank.length !== world || answers.length !== world) {
    throw refuse(`has ${shardOfRank.length} shards and ${answers.length} answers; expected ${world}, one per rank`);
  }
  const count = Math.max(...shardOfRank) + 1;
  for (let shard = 0; shard < count; shard++) {
    if (!shardOfRank.includes(shard))
      throw refuse(`sends shard ${shard} of ${count} to no rank; its rows would be lost`);
    const ranks = answering(routing).filter((rank) => shardOfRank[rank] === shard);
    if (gives === 'list' || ranks.length === 1) continue;
    throw refuse(
      `collects shard ${shard} from ranks [${ranks.join(', ')}]; expected exactly one answer per shard to join. ` +
        'Choose a protocol for this layout, or give the answers as a list',
    );
  }
  return routing;
}
