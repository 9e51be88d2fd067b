/**
 * A worker group is one worker class over the ranks of a 3D layout, called like one worker (HybridFlow [2409.19256], section
 * 4.1): each method spreads its first argument by its transfer protocol, runs on all ranks at once, and collects their answers.
 */
import { LockstepError } from '../errors.js';
import { type Coordinates, coordinatesOf, worldSize } from '../layout/parallel.js';
import { callRanks, type Group, type Method } from './call-ranks.js';
import { Future, heldOf, wholeOf } from './future.js';
import { findProtocol, type TransferProtocol, type transferProtocols } from './protocols.js';
import type { Form, Protocol, RankLayout, RoutedProtocol } from './routing.js';
import type { Shards } from './rows.js';
import { inProcess, type Transport } from './transport.js';

/** What a worker is told when it is made. */
export interface RankContext extends RankLayout {
  readonly rank: number;
  readonly coordinates: Coordinates;
}

type MethodName<W> = { [K in keyof W]: W[K] extends Method ? K : never }[keyof W] & string;

/** A protocol of Table 3, the name of a registered one, or a pair. */
export type ProtocolEntry = TransferProtocol | (string & {}) | Protocol;

/** Which protocol each method of a worker has. */
export type ProtocolTable<W> = { readonly [K in MethodName<W>]?: ProtocolEntry };

export interface WorkerGroupOptions<W, P> extends RankLayout {
  /** Named in errors. */
  readonly name: string;
  /** Makes the worker of a rank; or the workers by rank. */
  readonly worker: ((rank: RankContext) => W) | readonly W[];
  /** A method's first argument is spread by its protocol; the others go to every rank as they are. */
  readonly protocols: P;
  /** Default: ranks of this process. */
  readonly transport?: Transport;
  /** How long a call that failed waits for the ranks that are still running; default 30. */
  readonly timeoutSeconds?: number;
}

/** The methods of a table, over all ranks. A first argument that is a future is taken as it lies, unjoined. */
export type WorkerGroup<W, P> = {
  readonly [K in keyof P & MethodName<W>]: W[K] extends (...args: infer Args) => infer Answer
    ? (...args: GroupArgs<Args, Resolved<P[K]>>) => Future<GroupAnswer<Awaited<Answer>, Resolved<P[K]>>>
    : never;
};

type Resolved<Entry> = Entry extends TransferProtocol ? (typeof transferProtocols)[Entry] : Entry;

type Held<T> = T | Future<Exclude<T, Shards<unknown>>>;

type GroupArgs<Args extends unknown[], P> = Args extends [infer First, ...infer Rest]
  ? P extends RoutedProtocol<infer Takes, Form>
    ? [Held<Takes extends 'list' ? readonly First[] | Shards<First> : First | Shards<First>>, ...Rest]
    : P extends { distribute(argument: infer Argument, ranks: RankLayout): unknown }
      ? [Held<Argument>, ...Rest]
      : [unknown, ...Rest]
  : Args;

type GroupAnswer<Answer, P> =
  P extends RoutedProtocol<Form, infer Gives>
    ? Gives extends 'list'
      ? Answer[]
      : Answer
    : P extends { collect(...args: never[]): infer Result }
      ? Result
      : unknown;

/** Makes worker groups. */
export const WorkerGroup = {
  /**
   * Errors: `GROUP_INVALID` for a number of workers other than ranks or a method that a worker does not have; `PROTOCOL_UNKNOWN`,
   * `PROTOCOL_INVALID`. A call rejects with `RANK_FAILED` when ranks fail, with `BATCH_INVALID` when a batch cannot be cut or
   * joined, with `PROTOCOL_MISSING` when the table does not name it.
   */
  create: <W extends object, const P extends ProtocolTable<NoInfer<W>>>(
    options: WorkerGroupOptions<W, P>,
  ): WorkerGroup<W, P> => {
    const { name, layout, generation, transport = inProcess, timeoutSeconds = 30 } = options;
    const ranks: RankLayout = { layout, ...(generation ? { generation } : {}) };
    const workers = workersOf(options, ranks) as unknown as Group['workers'];
    const group: Group = { name, ranks, workers, transport, timeoutSeconds };
    const methods: Record<string, Method> = {};
    for (const method of methodNames(workers[0]!)) methods[method] = refusal(name, method);
    for (const [method, entry] of Object.entries(options.protocols as Readonly<Record<string, ProtocolEntry>>)) {
      methods[method] = methodOver(group, method, entry);
    }
    groups.add(methods);
    return methods as WorkerGroup<W, P>;
  },
};

const groups = new WeakSet<object>();

/** Whether a worker takes a batch in parts (`Shards`) as it is. */
export function takesParts(worker: object): boolean {
  return groups.has(worker);
}

function workersOf<W, P>({ name, worker }: WorkerGroupOptions<W, P>, ranks: RankLayout): readonly W[] {
  const { pipeline, tensor, data } = ranks.layout;
  const world = worldSize(ranks.layout);
  const size = `pipeline ${pipeline} x tensor ${tensor} x data ${data} = ${world} ranks`;
  if (typeof worker === 'function') {
    return Array.from({ length: world }, (_, rank) =>
      worker({ ...ranks, rank, coordinates: coordinatesOf(rank, ranks.layout) }),
    );
  }
  if (worker.length === world) return worker;
  throw new LockstepError(
    'GROUP_INVALID',
    `Group ${name} has ${worker.length} workers and a layout of ${size}; expected one worker per rank.`,
    { group: name, workers: worker.length, ranks: world },
  );
}

function methodOver(group: Group, method: string, entry: ProtocolEntry): Method {
  const { name, ranks, workers } = group;
  const without = workers.findIndex((worker) => typeof worker[method] !== 'function');
  if (without >= 0) {
    const known = methodNames(workers[without]!).join(', ');
    throw new LockstepError(
      'GROUP_INVALID',
      `Group ${name} has a protocol for ${method}, which the worker of rank ${without} does not have; it has ${known}.`,
      { group: name, method, rank: without },
    );
  }
  const within = <T>(step: () => T): T => naming(`${name}.${method}`, step);
  const protocol = within(() => (typeof entry === 'string' ? findProtocol(entry) : entry));
  const collected = within(() => protocol.answers?.(ranks)) ?? workers.map(() => true);
  const call = async (args: readonly unknown[]): Promise<unknown> => {
    const [first, ...others] = await Promise.all(args.map((arg, i) => (i === 0 ? heldOf(arg) : arg)));
    const parts = args.length > 0 ? within(() => protocol.distribute(first, ranks)) : undefined;
    if (parts && parts.length !== workers.length) {
      const counts = `${parts.length} parts for ${workers.length} ranks`;
      throw new LockstepError(
        'PROTOCOL_INVALID',
        `${name}.${method}: distribute made ${counts}; expected one for each.`,
      );
    }
    const answers = await callRanks(group, method, {
      collected,
      firstRows: parts && protocol.firstRows?.(parts, ranks),
      argsOf: (rank) => (parts ? [parts[rank], ...others] : []),
    });
    return within(() => (protocol.parts ? protocol.parts(answers, ranks) : protocol.collect(answers, ranks)));
  };
  const whole = (held: unknown) => within(() => wholeOf(held));
  return (...args: unknown[]) => new Future(`${name}.${method}`, call(args), { whole });
}

function refusal(name: string, method: string): Method {
  return async () => {
    throw new LockstepError(
      'PROTOCOL_MISSING',
      `${name}.${method} has no transfer protocol; add ${method} to the table of protocols of the group.`,
      { group: name, method },
    );
  };
}

/** Of an object or of its class. */
function methodNames(worker: object): string[] {
  const names = new Set<string>();
  for (let at = worker; at !== Object.prototype && at !== null; at = Object.getPrototypeOf(at)) {
    for (const [name, { value }] of Object.entries(Object.getOwnPropertyDescriptors(at))) {
      if (typeof value === 'function' && name !== 'constructor') names.add(name);
    }
  }
  return [...names];
}

/** Says of which call an error tells. */
function naming<T>(where: string, step: () => T): T {
  try {
    return step();
  } catch (error) {
    if (!LockstepError.isInstance(error)) throw error;
    throw new LockstepError(error.code, `${where}: ${error.message}`, error.details, { cause: error });
  }
}
