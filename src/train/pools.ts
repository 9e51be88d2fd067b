/** The pools of a run: where each model lies, with devices and offload of its own pool. */
import type { Materialised } from '../cluster/future.js';
import type { Placed, ResourcePool } from '../cluster/resource-pool.js';
import { ResourcePools } from '../cluster/resource-pools.js';
import { type Backend, type BackendDevice, threadShare } from '../inference/backend.js';
import type { Closing } from './closing.js';
import { type Config, parseBytes } from './config.js';
import { type PoolDevices, ranksOf } from './gpus.js';
import { holding } from './phases.js';
import type { PoolPlan } from './preflight.js';
import type { Lane, Recorder } from './recorder.js';
import type { Role } from './roles.js';
import { Rotation } from './rotation.js';

/** What a model's engine is made with. */
export interface RunPool {
  readonly pool: ResourcePool;
  readonly device: BackendDevice;
  /** With `memory.offload`. */
  readonly rotation: Rotation | undefined;
  readonly lane: Lane;
}

export interface RunPoolsOptions {
  readonly config: Config;
  readonly plans: readonly PoolPlan[];
  readonly backend: Backend;
  readonly offloadFolder: string;
  readonly recorder: Recorder;
  readonly cancel?: AbortSignal | undefined;
  /** Closes the devices. */
  readonly closing: Closing;
}

/** Phases of methods, by the recorder's and the preflight's names. */
type Methods<W> = Partial<Record<keyof W & string, string>>;

export class RunPools {
  private constructor(
    private readonly pools: ResourcePools,
    private readonly byRole: ReadonlyMap<string, RunPool>,
  ) {}

  /** Opens the devices of every pool; threads are divided among pools, each has at least one. */
  static async open(options: RunPoolsOptions): Promise<RunPools> {
    const { config, plans, recorder, cancel } = options;
    const ranks = ranksOf(config);
    const parts = plans.map(({ pool, devices: place, rotation: plan }, index) => {
      const lane = plans.length === 1 ? recorder : recorder.lane(pool.name, index);
      const { offload } = config.memory;
      const rotation = plan && offload !== 'none' ? new Rotation(plan, offload, lane) : undefined;
      return {
        ...pool,
        lane,
        rotation,
        place,
        devices: Array.from({ length: ranks }, (_, rank) => index * ranks + rank),
      };
    });
    const pools = ResourcePools.create(
      parts.map(({ name, devices, lane, rotation }) => ({
        name,
        devices,
        around: async (phase, work) => {
          await rotation?.enter(phase);
          return lane.phase(phase, work);
        },
      })),
      {
        ...(cancel ? { signal: cancel } : {}),
        onMaterialise: (what: Materialised) => recorder.materialised(what),
      },
    );
    const byRole = new Map<string, RunPool>();
    for (const [index, { name, roles, lane, rotation, place }] of parts.entries()) {
      const pool = pools.get(name);
      const threads = threadShare(config.threads, parts.length, index);
      const device = await openDevice(options, { pool, lane, place, threads });
      for (const role of roles) byRole.set(role, { pool, device, rotation, lane });
    }
    return new RunPools(pools, byRole);
  }

  of(role: Role['name']): RunPool {
    return this.byRole.get(role)!;
  }

  /** A role's worker with the listed methods as calls of its pool. */
  place<W extends object, const M extends Methods<W>>(role: Role['name'], worker: W, methods: M): Placed<W, M> {
    return this.of(role).pool.place(role, worker, methods);
  }

  /** Runs `work` in turn when all that a checkpoint keeps of the model is on its devices. */
  hold<T>(role: Role['name'], work: () => Promise<T>): Promise<T> {
    const { pool, rotation } = this.of(role);
    return pool.turn(async () => {
      await rotation?.enter(holding(role));
      return work();
    });
  }

  /** Runs a step or an evaluation: the first call that fails ends it. */
  supervise<T>(work: () => Promise<T>): Promise<T> {
    return this.pools.supervise(work);
  }

  /** Waits for the calls that run. */
  close(): Promise<void> {
    return this.pools.close();
  }
}

async function openDevice(
  { config, backend, offloadFolder, closing }: RunPoolsOptions,
  { pool, lane, place, threads }: { pool: ResourcePool; lane: Lane; place: PoolDevices; threads: number },
): Promise<BackendDevice> {
  const device = await backend.openDevice({
    processor: config.device,
    threads,
    memoryBytes: place.memoryBytes,
    limit: place.limit,
    ...(place.firstGpu === undefined ? {} : { firstGpu: place.firstGpu }),
    hostBytes: parseBytes(config.memory.host),
    offloadFolder,
    layout: config.parallel,
    onWork: (work, rank) => {
      lane.work(work, rank);
      pool.alive(`${work.operation} on rank ${rank}`);
    },
  });
  return closing.own(device);
}
