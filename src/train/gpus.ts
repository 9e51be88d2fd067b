/** A run on GPUs: which pool computes on which, how much memory it has there, and what it needs beside models and workspace. */
import { configLimit, gpuBudget, type MemoryLimit } from '../engine/device.js';
import { generationRows, generationSequences, sampledRows } from '../engine/generation-needs.js';
import { loadNative, resolveProcessor, rowGrainOf } from '../engine/native.js';
import {
  type GpuCall,
  type GpuShare,
  gpuAddendBytes,
  gpuArrayBytes,
  gpuGraphBytes,
  gpuPageBytes,
  gpuScratchBytes,
  gpuTableBytes,
} from '../layout/gpu-plan.js';
import { largestCall } from '../layout/memory-plan.js';
import { worldSize } from '../layout/parallel.js';
import { resolveParts } from '../layout/parts.js';
import { type Config, parseBytes } from './config.js';
import type { MemoryLine } from './events.js';
import { mostOf, mostSequences } from './phases.js';
import type { Role } from './roles.js';

/** What a rank's device may take where `memory.device` is auto and it is a CPU. */
const cpuBytes = 8 * 2 ** 30;

/** Where a pool of ranks computes. */
export interface PoolDevices {
  /** Budget of each rank. */
  memoryBytes: number;
  /** What sets it. */
  limit: MemoryLimit;
  /** Rank r computes on GPU `firstGpu + r`; absent on a CPU. */
  firstGpu?: number;
  /** Other pools compute on the same GPUs. */
  shared?: boolean;
}

/** Ranks of each pool. */
export const ranksOf = ({ parallel: { pipeline, tensor, data } }: Config): number =>
  worldSize({ pipeline, tensor, data });

/**
 * The devices of each of so many pools. Pools have GPUs of their own where there are enough for all, else they share them, each with an
 * equal part of what is free. Without a number in `memory.device` a pool leaves something to the driver and NCCL (`gpuBudget`).
 * @throws LockstepError DEVICE_INVALID, and what a device on these GPUs would throw: CUDA_UNAVAILABLE, CUDA_DEVICE, CUDA_ARCHITECTURE
 */
export function poolDevices(config: Config, pools: number): PoolDevices[] {
  const { device } = config.memory;
  const asked = device === 'auto' ? undefined : parseBytes(device);
  const ofConfig = { memoryBytes: asked ?? cpuBytes, limit: configLimit };
  if (resolveProcessor(config.device) !== 'cuda') return Array.from({ length: pools }, () => ofConfig);
  const ranks = ranksOf(config);
  const shared = pools > 1 && pools * ranks > loadNative().cuda().gpus.length;
  return Array.from({ length: pools }, (_, pool) => {
    const firstGpu = shared ? 0 : pool * ranks;
    const budgets = Array.from({ length: ranks }, (_, rank) =>
      gpuBudget(firstGpu + rank, { pools: shared ? pools : 1, asked: asked !== undefined }),
    );
    const least = budgets.reduce((a, b) => (b.memoryBytes < a.memoryBytes ? b : a));
    const budget = asked !== undefined && asked <= least.memoryBytes ? ofConfig : least;
    return { ...budget, firstGpu, shared };
  });
}

/** What decides the bits of bfloat16: the kinds of GPUs that compute; none on a CPU. */
export interface Architecture {
  gpus: { name: string; computeCapability: string }[];
}

export function architectureOf(pools: readonly PoolDevices[], config: Config): Architecture {
  const first = pools.flatMap(({ firstGpu }) => (firstGpu === undefined ? [] : [firstGpu]));
  if (first.length === 0) return { gpus: [] };
  const used = first.flatMap((gpu) =>
    loadNative()
      .cuda()
      .gpus.slice(gpu, gpu + ranksOf(config)),
  );
  const kinds = used.map(({ name, major, minor }) => ({ name, computeCapability: `${major}.${minor}` }));
  return { gpus: [...new Map(kinds.map((kind) => [JSON.stringify(kind), kind])).values()] };
}

/** Of the models of a pool on a GPU, beside models and workspace: queues are of the device, sums across ranks of each model. */
export function gpuLine(roles: readonly Role[], config: Config): MemoryLine {
  const calls = roles.map((role) => ({ role, call: gpuCall(role, config) }));
  const most = (bytes: (share: GpuShare, call: GpuCall) => number): number =>
    Math.max(...calls.map(({ role, call }) => mostOfShare(role, config, (share) => bytes(share, call))));
  const ofModels = roles.reduce((sum, role) => sum + addendBytes(role, config) + tableBytes(role, config), 0);
  // The workspace, and of each model its weights, gradients and optimizer state; those that generate in another layout keep their
  // training shards apart.
  const arenas = roles.reduce(
    (sum, { trained, generates }) => sum + (trained ? 3 : 1) + (generates && config.generation ? 1 : 0),
    1,
  );
  const bytes = most(gpuScratchBytes) + most(gpuArrayBytes) + most(gpuGraphBytes) + ofModels + arenas * gpuPageBytes;
  return { what: 'CUDA queues and NCCL', bytes };
}

/** In the layout that a model trains in, and in that which it generates in. */
function tableBytes(role: Role, config: Config): number {
  const { dtype, generation, numerics } = config;
  const whole = { shape: role.shape, parts: resolveParts(role.shape, numerics.parts), dtype };
  return (
    mostOf(role, config, ({ share }) => gpuTableBytes({ ...share, dtype }, share.keyValueRanks, role.trained)) +
    (role.generates && generation ? gpuTableBytes(whole, 1, false) : 0)
  );
}

/** The same of addends. */
function addendBytes({ shape, generates }: Role, { parallel, generation }: Config): number {
  const { pipeline, tensor, data } = parallel;
  const layouts = [{ pipeline, tensor, data }, ...(generates && generation ? [{ ...generation, data: 1 }] : [])];
  return layouts.reduce(
    (sum, degrees) => sum + gpuAddendBytes(degrees, Math.max(1, degrees.tensor / shape.keyValueHeads), shape.tied),
    0,
  );
}

function gpuCall(role: Role, config: Config): GpuCall {
  const { score, generate } = mostSequences(config);
  const { rows } = largestCall(config.batch.microTokens, score, rowGrainOf(config.device));
  const samples = sampledRows(Math.min(generate, generationSequences), config.rollout.speculation);
  const generating = Math.max(generationRows, samples);
  return {
    rows: role.generates ? Math.max(rows, generating) : rows,
    sequences: role.generates ? Math.max(score, generate, samples) : score,
    train: role.trained,
    generates: role.generates,
  };
}

/** Of the rank that needs most; a row of logits is the whole vocabulary's in generation, which may take whole models, too. */
function mostOfShare(role: Role, config: Config, bytes: (share: GpuShare) => number): number {
  const { dtype, numerics, generation } = config;
  const { vocabulary } = role.shape;
  const own = mostOf(role, config, ({ share }) =>
    bytes({ shape: { ...share.shape, vocabulary }, parts: share.parts, dtype }),
  );
  if (!role.generates || generation === undefined) return own;
  return Math.max(own, bytes({ shape: role.shape, parts: resolveParts(role.shape, numerics.parts), dtype }));
}
