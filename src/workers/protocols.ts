/**
 * How the rows of a worker's calls travel over the ranks of its model: the type of the tables that workers carry (HybridFlow
 * [2409.19256], section 4.1). An engine over ranks cuts rows by the same rules; a worker group reads them from the table.
 */
import type { TransferProtocol } from '../cluster/protocols.js';

/** Methods that compute: those that answer with a promise. */
type CallOf<W> = { [K in keyof W]: W[K] extends (...args: never[]) => Promise<unknown> ? K : never }[keyof W];

/** A protocol for each call of a worker, and for nothing else. */
export type Protocols<W> = { readonly [K in CallOf<W>]: TransferProtocol };
