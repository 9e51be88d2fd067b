// Where CUDA's compiler is.
import { spawnSync } from 'node:child_process';
import { accessSync, constants, existsSync, realpathSync } from 'node:fs';
import { delimiter, dirname, join } from 'node:path';

export const neededCuda = 13;

function executable(file) {
  try {
    accessSync(file, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

function versionOf(nvcc) {
  const result = spawnSync(nvcc, ['--version'], { encoding: 'utf8' });
  return /release (\d+\.\d+)/.exec(result.stdout ?? '')?.[1];
}

/** `name` of CUDA in the folders where it may lie, the most explicit first. */
function candidates(name, environment) {
  const roots = [environment.CUDA_PATH, environment.CUDA_HOME].filter(Boolean).map((root) => join(root, 'bin'));
  const path = (environment.PATH ?? '').split(delimiter).filter(Boolean);
  return [...roots, ...path, '/usr/local/cuda/bin'].map((folder) => join(folder, name)).filter(executable);
}

/**
 * { nvcc, version, nvtx: has its header } of the first CUDA that is new enough; otherwise { problem }, a sentence. LOCKSTEP_NVCC
 * names it, or CUDA_PATH/bin, CUDA_HOME/bin, PATH and /usr/local/cuda/bin are looked through.
 */
export function findNvcc(environment = process.env) {
  const explicit = environment.LOCKSTEP_NVCC;
  if (explicit && !executable(explicit)) return { problem: `LOCKSTEP_NVCC=${explicit} is no program` };
  const files = explicit ? [explicit] : candidates('nvcc', environment);
  const found = files.map((file) => ({ nvcc: file, version: versionOf(file) }));
  const fits = found.find(({ version }) => Number.parseInt(version ?? '', 10) === neededCuda);
  // The libraries are found from where the compiler really lies.
  if (fits) {
    const nvcc = realpathSync(fits.nvcc);
    const nvtx = existsSync(join(dirname(dirname(nvcc)), 'include', 'nvtx3', 'nvToolsExt.h'));
    return { nvcc, version: fits.version, nvtx };
  }
  const [first] = found;
  if (first === undefined) {
    return { problem: 'no nvcc (looked in LOCKSTEP_NVCC, CUDA_PATH/bin, CUDA_HOME/bin, PATH, /usr/local/cuda/bin)' };
  }
  const { nvcc, version = 'of a version that it does not tell' } = first;
  return { problem: `${nvcc} is CUDA ${version}, and CUDA ${neededCuda} is needed` };
}

/** A tool that comes beside nvcc, or undefined. */
export function findCudaTool(name, nvcc, environment = process.env) {
  const beside = nvcc ? [join(dirname(nvcc), name)] : [];
  return [...beside, ...candidates(name, environment)].find(executable);
}
