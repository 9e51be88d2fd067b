/** The pools of a program: disjoint sets of devices, and the iterations that run over them. */
import { LockstepError } from '../errors.js';
import { type DeviceId, ResourcePool, type ResourcePoolOptions } from './resource-pool.js';
import { supervise } from './supervision.js';

/** The pools of a program; no device is in two. */
export class ResourcePools implements AsyncDisposable {
  private constructor(
    readonly pools: readonly ResourcePool[],
    readonly signal: AbortSignal | undefined,
  ) {}

  /**
   * `common` holds for all pools; a pool's own options come before it.
   * Errors: `POOL_OVERLAP` for a device in two pools, `POOL_EXISTS` for a name given twice, `POOL_INVALID`.
   */
  static create(
    pools: readonly ResourcePoolOptions[],
    common: Omit<Partial<ResourcePoolOptions>, 'name' | 'devices'> = {},
  ): ResourcePools {
    const names = new Set<string>();
    const owners = new Map<DeviceId, string>();
    for (const { name, devices } of pools) {
      if (names.has(name)) {
        throw new LockstepError('POOL_EXISTS', `There are two pools ${name}; give each a name of its own.`, { name });
      }
      names.add(name);
      for (const device of new Set(devices)) {
        const owner = owners.get(device);
        if (owner !== undefined) throw overlap(device, owner, name);
        owners.set(device, name);
      }
    }
    return new ResourcePools(
      pools.map((options) => ResourcePool.create({ ...common, ...options })),
      common.signal,
    );
  }

  /** Errors: `POOL_UNKNOWN`. */
  get(name: string): ResourcePool {
    const pool = this.pools.find((each) => each.name === name);
    if (pool) return pool;
    const known = this.pools.map((each) => each.name).join(', ');
    throw new LockstepError('POOL_UNKNOWN', `There is no pool ${name}; expected one of ${known}.`, { name });
  }

  /** An iteration over the pools: see `supervise`. */
  supervise<T>(work: () => Promise<T>): Promise<T> {
    return supervise(work, this.signal ? { signal: this.signal } : {});
  }

  /** Closes all pools; idempotent. */
  async close(): Promise<void> {
    await Promise.all(this.pools.map((pool) => pool.close()));
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

function overlap(device: DeviceId, one: string, other: string): LockstepError {
  return new LockstepError(
    'POOL_OVERLAP',
    `Device ${device} is in the pools ${one} and ${other}, which run at the same time; pools must not share devices. Models that ` +
      'are to take turns on a device belong in one pool.',
    { device, pools: [one, other] },
  );
}
