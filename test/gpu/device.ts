/**
 * Tests of the CUDA back end. They run on emulated GPUs (native/cuda/emulation), so on every machine; with LOCKSTEP_DEVICE=cuda
 * on real ones. Emulated kernels give the CPU's bits; of a real GPU that is asked of float32 only: tensor cores round bfloat16
 * products in a way of their own.
 */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import type { Dtype } from '../../src/engine/engine.js';

process.env.LOCKSTEP_DEVICE ||= 'cuda-emulated';

export const emulated = process.env.LOCKSTEP_DEVICE === 'cuda-emulated';

/** Whether a GPU gives the CPU's bits. */
export const sameAsCpu = (dtype: Dtype): boolean => emulated || dtype === 'float32';

if (emulated && !existsSync(join(process.cwd(), 'build', 'Release', 'lockstep_emulated.node'))) {
  throw new Error('the emulated addon is not built: run npm run build -- --tests');
}
