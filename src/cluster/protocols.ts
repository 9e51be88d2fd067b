/**
 * The transfer protocols of HybridFlow [2409.19256], Table 3, and the registry that users add theirs to. p, t, d are a rank's
 * pipeline, tensor and data coordinates.
 */
import { LockstepError } from '../errors.js';
import { coordinatesOf, generationReplicas, worldSize } from '../layout/parallel.js';
import { type Protocol, type RankLayout, routed } from './routing.js';

/** Table 3 by name. */
export const transferProtocols = {
  /** The same to all ranks; the list of all answers. */
  ONE_TO_ALL: routed('batch', 'list', (ranks) => byRank(ranks, () => ({ shard: 0, answers: true }))),
  /** Cut over data parallel replicas; joined from each one's last stage. */
  '3D_PROTO': routed('batch', 'batch', (ranks) =>
    byRank(ranks, ({ p, t, d }) => ({ shard: d, answers: p === ranks.layout.pipeline - 1 && t === 0 })),
  ),
  /** Cut over generation replicas (Table 3's "micro DP groups"); joined from the first rank of each. */
  '3D_ALL_MICRO_DP': routed('batch', 'batch', (ranks) => {
    const { replicaOfRank } = generationReplicas(ranks.layout, generationOf(ranks));
    return byRank(ranks, ({ rank }) => {
      const replica = replicaOfRank[rank]!;
      return { shard: replica, answers: replicaOfRank.indexOf(replica) === rank };
    });
  }),
  /** The same to all ranks; a list with an answer per pipeline stage. */
  '3D_PP_ONLY': routed('batch', 'list', (ranks) => byRank(ranks, ({ t, d }) => ({ shard: 0, answers: t + d === 0 }))),
  /** Cut over and joined from the ranks of a group that is data parallel only. */
  DP_PROTO: routed('batch', 'batch', (ranks) => byRank(ranks, ({ d }) => ({ shard: d, answers: true }))),
  /** A list of one argument per rank; the list of all answers. */
  ALL_TO_ALL: routed('list', 'list', (ranks) => byRank(ranks, ({ rank }) => ({ shard: rank, answers: true }))),
} satisfies Record<string, Protocol>;

/** A name of Table 3. */
export type TransferProtocol = keyof typeof transferProtocols;

const registry = new Map<string, Protocol>(Object.entries(transferProtocols));

/** Makes a pair known by name; it is also returned, to stand in a table itself. Errors: `PROTOCOL_EXISTS`. */
export function registerProtocol<P extends Protocol>(name: string, protocol: P): P {
  if (registry.has(name)) {
    throw new LockstepError(
      'PROTOCOL_EXISTS',
      `A transfer protocol ${name} is registered already; choose another name.`,
      {
        name,
      },
    );
  }
  registry.set(name, protocol);
  return protocol;
}

/** Errors: `PROTOCOL_UNKNOWN`. */
export function findProtocol(name: string): Protocol {
  const protocol = registry.get(name);
  if (protocol) return protocol;
  const known = [...registry.keys()].join(', ');
  throw new LockstepError(
    'PROTOCOL_UNKNOWN',
    `There is no transfer protocol ${name}; expected one of ${known}, or one that registerProtocol adds.`,
    { name },
  );
}

interface Place {
  rank: number;
  p: number;
  t: number;
  d: number;
}

function byRank({ layout }: RankLayout, route: (place: Place) => { shard: number; answers: boolean }) {
  const routes = Array.from({ length: worldSize(layout) }, (_, rank) => {
    const { pipeline, tensor, data } = coordinatesOf(rank, layout);
    return route({ rank, p: pipeline, t: tensor, d: data });
  });
  return { shardOfRank: routes.map(({ shard }) => shard), answers: routes.map(({ answers }) => answers) };
}

function generationOf({ generation }: RankLayout) {
  if (generation) return generation;
  throw new LockstepError(
    'PROTOCOL_INVALID',
    '3D_ALL_MICRO_DP cuts over generation replicas and the group has no generation layout; give `generation`, or use 3D_PROTO.',
  );
}
