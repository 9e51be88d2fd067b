/**
 * Resource pools, and worker groups over ranks with their transfer protocols; what a worker asks about the call that it is in
 * (`lockstep-rlhf/cluster`). It knows no model: the workers may be anyone's.
 */
export type { Awaitable } from '../data/awaitable.js';
export type { Coordinates, Degrees, GenerationDegrees } from '../layout/parallel.js';
export { callFirstRow, callProgress, callSignal } from './call-context.js';
export type { Method } from './call-ranks.js';
export type { Future, FutureOptions, Materialised } from './future.js';
export { registerProtocol, type TransferProtocol, transferProtocols } from './protocols.js';
export type { DeviceId, Placed, ResourcePool, ResourcePoolOptions } from './resource-pool.js';
export { ResourcePools } from './resource-pools.js';
export { type Form, type Protocol, type RankLayout, type RoutedProtocol, type Routing, routed } from './routing.js';
export type { Shards } from './rows.js';
export type { RankCall, Transport } from './transport.js';
export {
  type ProtocolEntry,
  type ProtocolTable,
  type RankContext,
  WorkerGroup,
  type WorkerGroupOptions,
} from './worker-group.js';
