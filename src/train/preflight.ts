/** What a run needs of its device, added up before anything is allocated, and refused with the arithmetic shown. */
import type { MemoryLimit } from '../engine/device.js';
import { LockstepError } from '../errors.js';
import { snapshotBytes } from '../layout/memory-plan.js';
import { largestPhase, RotationPlan, stateGroups } from '../layout/rotation.js';
import { type Config, parseBytes } from './config.js';
import type { MemoryLine, MemoryTable, PoolGpus } from './events.js';
import { gpuLine, type PoolDevices, poolDevices, ranksOf } from './gpus.js';
import { mostOf, phasesOf, type RunPhase, statesOf } from './phases.js';
import { type PlacedRoles, poolsOf } from './placement.js';
import type { Role } from './roles.js';

interface HostLine extends MemoryLine {
  advice: string;
}

/** A pool, and with `memory.offload` the plan that it follows. */
export interface PoolPlan {
  pool: PlacedRoles<Role['name']>;
  /** Where it computes, with what models and workspace may take. */
  devices: PoolDevices;
  rotation?: RotationPlan;
}

/** The arithmetic, and the pools of the run. */
export interface Preflight {
  memory: MemoryTable;
  pools: PoolPlan[];
}

/**
 * Of each pool, without offload the models' weights, gradients and optimizer state, and the largest of the calls that use the
 * workspace in turn; with it what the call that needs most has on the device. On GPUs also what queues and communication take there.
 *
 * @throws LockstepError CONFIG_CONTRADICTION for a placement that does not fit the run's models; MEMORY_BUDGET when they exceed
 * `memory.device` or what a GPU has free, or what leaves the devices or is copied for checkpoints exceeds `memory.host`; what
 * `poolDevices` throws.
 */
export function preflight(roles: readonly Role[], config: Config): Preflight {
  const names = roles.map(({ name }) => name);
  const places = poolsOf(config.placement, names);
  const devices = poolDevices(config, places.length);
  const pools = places.map((pool, i) => {
    const own = roles.filter(({ name }) => pool.roles.includes(name));
    return { ...planPool(own, config, devices[i]!, places.length === 1 ? undefined : pool.name), pool };
  });
  const { totalBytes, budgetBytes } = pools
    .map(({ memory }) => memory)
    .reduce((a, b) => (b.totalBytes > a.totalBytes ? b : a));
  const rotations = pools.flatMap(({ rotation }) => (rotation ? [rotation] : []));
  checkHost(hostLines(roles, config, rotations), config);
  const lines = pools.flatMap(({ memory }) => memory.lines);
  const gpus = pools.flatMap(({ pool, devices }) =>
    gpusOf(devices, config, places.length === 1 ? undefined : pool.name),
  );
  return {
    memory: { lines, totalBytes, budgetBytes, ...(gpus.length > 0 ? { gpus } : {}) },
    pools: pools.map(({ pool, devices, rotation }) => ({ pool, devices, ...(rotation ? { rotation } : {}) })),
  };
}

/** None on a CPU. */
function gpusOf({ firstGpu, shared = false }: PoolDevices, config: Config, pool: string | undefined): PoolGpus[] {
  if (firstGpu === undefined) return [];
  const last = firstGpu + ranksOf(config) - 1;
  return [{ ...(pool === undefined ? {} : { pool }), first: firstGpu, last, shared }];
}

/** `pool` is its name in a run of several. */
function planPool(roles: readonly Role[], config: Config, devices: PoolDevices, pool: string | undefined) {
  const { offload } = config.memory;
  const budgetBytes = devices.memoryBytes;
  const beside = devices.firstGpu === undefined ? [] : [gpuLine(roles, config)];
  const besideBytes = beside.reduce((sum, { bytes }) => sum + bytes, 0);
  const lines = [...(offload === 'none' ? allLines(roles, config) : largestLines(roles, config)), ...beside].map(
    (line) => ({ ...(pool === undefined ? {} : { pool }), ...line }),
  );
  const totalBytes = lines.reduce((sum, line) => sum + line.bytes, 0);
  const memory: MemoryTable = { lines, totalBytes, budgetBytes };
  const settings = {
    models: statesOf(roles, config),
    phases: phasesOf(roles, config),
    budgetBytes: budgetBytes - besideBytes,
  };
  if (totalBytes > budgetBytes) {
    const advice = offload === 'none' ? offloadAdvice(roles, config, settings) : '';
    throw tooLarge(memory, { limit: devices.limit, pool, advice });
  }
  return {
    memory,
    devices: { ...devices, memoryBytes: settings.budgetBytes },
    rotation: offload === 'none' ? undefined : new RotationPlan(settings),
  };
}

function tooLarge(
  memory: MemoryTable,
  { limit, pool, advice }: { limit: MemoryLimit; pool: string | undefined; advice: string },
): LockstepError {
  const { lines, totalBytes, budgetBytes } = memory;
  return new LockstepError(
    'MEMORY_BUDGET',
    `${pool === undefined ? 'the run' : `pool ${pool}`} needs ${mebibytes(totalBytes)}, more than ${limit.what} (${mebibytes(budgetBytes)}):\n` +
      lines.map(({ what, bytes }) => `  ${mebibytes(bytes).padStart(12)}  ${what}`).join('\n') +
      `\n${limit.more}, lower batch.microTokens, or set memory.recompute${advice}`,
    { ...memory },
  );
}

/** Whether the models would fit in turn. */
function offloadAdvice(
  roles: readonly Role[],
  config: Config,
  settings: ConstructorParameters<typeof RotationPlan>[0],
): string {
  const { bytes, phase } = largestPhase(settings);
  if (bytes > settings.budgetBytes) return '';
  const rotation = new RotationPlan(settings);
  const { hostBytes } = rotation;
  const inHost = { ...config, memory: { ...config.memory, offload: 'host' as const } };
  const allBytes = hostLines(roles, inHost, [rotation]).reduce((sum, line) => sum + line.bytes, 0);
  const place = allBytes <= parseBytes(config.memory.host) ? 'host' : 'file';
  return (
    `; memory.offload: ${place} would fit: in turn the models need ${mebibytes(bytes)} of the device (${phase.name}) and ` +
    `${mebibytes(hostBytes)} of ${place === 'host' ? 'host memory' : 'the disk'}`
  );
}

/** What leaves the device, and what a checkpoint is written from behind the steps. */
function hostLines(roles: readonly Role[], config: Config, rotations: readonly RotationPlan[]): HostLine[] {
  const leaving = rotations.reduce((sum, { hostBytes }) => sum + hostBytes, 0);
  const trained = roles.filter((role) => role.trained);
  const copied = trained.reduce((sum, role) => sum + mostOf(role, config, ({ table }) => snapshotBytes(table)), 0);
  const names = trained.map(({ name }) => name).join(' and ');
  return [
    ...(config.memory.offload === 'host' && rotations.length > 0
      ? [{ what: 'models off the device', bytes: leaving, advice: 'set memory.offload: file' }]
      : []),
    ...(config.checkpoint.async
      ? [{ what: `a checkpoint's copy of ${names}`, bytes: copied, advice: 'set checkpoint.async: false' }]
      : []),
  ];
}

function checkHost(lines: readonly HostLine[], config: Config): void {
  const hostBytes = lines.reduce((sum, { bytes }) => sum + bytes, 0);
  const budgetBytes = parseBytes(config.memory.host);
  if (hostBytes <= budgetBytes) return;
  const parts = lines.map(({ what, bytes }) => `${mebibytes(bytes)} for ${what}`).join(' and ');
  throw new LockstepError(
    'MEMORY_BUDGET',
    `the run needs ${parts} in host memory, more than memory.host (${mebibytes(budgetBytes)}); ` +
      ['raise memory.host', ...lines.map(({ advice }) => advice)].join(', or '),
    { hostBytes, budgetBytes },
  );
}

function allLines(roles: readonly Role[], config: Config): MemoryLine[] {
  const workspace = phasesOf(roles, config).reduce((a, b) => (b.workspaceBytes > a.workspaceBytes ? b : a));
  return [...modelLines(roles, config, () => true), workspaceLine(workspace)];
}

function largestLines(roles: readonly Role[], config: Config): MemoryLine[] {
  const { phase } = largestPhase({ models: statesOf(roles, config), phases: phasesOf(roles, config) });
  const { model, groups } = phase;
  const lines = modelLines(roles, config, (name, group) => name === model && groups.includes(group));
  return [...lines, workspaceLine(phase as RunPhase)];
}

function modelLines(
  roles: readonly Role[],
  config: Config,
  counts: (model: string, group: (typeof stateGroups)[number]) => boolean,
): MemoryLine[] {
  return statesOf(roles, config).flatMap(({ name, bytes }) =>
    stateGroups
      .filter((group) => bytes[group] > 0 && counts(name, group))
      .map((group) => ({
        what: `${name}: ${group === 'parameters' ? 'weights' : group}`,
        bytes: bytes[group],
      })),
  );
}

const workspaceLine = ({ what, workspaceBytes }: RunPhase): MemoryLine => ({ what, bytes: workspaceBytes });

function mebibytes(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}
