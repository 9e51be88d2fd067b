/** Adam's moments beside a saved model: `moment1.<name>` and `moment2.<name>`, float32, in the layout of the checkpoint. */
import { join } from 'node:path';
import type { Engine, FileTensor, Saving } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import { makeDirectory } from './files.js';
import { checkpointTensors } from './hugging-face.js';
import { readSafetensorsHeader, type StoredTensor } from './safetensors.js';
import { type EngineTensor, type SaveTiming, saveTensors } from './saving.js';

const stateFile = 'optimizer.safetensors';
const moments = ['moment1', 'moment2'] as const;

function momentTensors(engine: Engine): EngineTensor[] {
  const tensors = checkpointTensors(engine);
  return moments.flatMap((space) =>
    tensors.map(({ name, shape }) => ({ name: `${space}.${name}`, shape, space, parameter: name })),
  );
}

/** Writes `optimizer.safetensors`. @throws CHECKPOINT_WRITE_FAILED */
export async function saveOptimizerState(engine: Engine, directory: string): Promise<void> {
  await (await beginSavingOptimizerState(engine, directory, {})).written;
}

/** The same, of the engine's present state; with `copy` it goes on when this has resolved. */
export async function beginSavingOptimizerState(
  engine: Engine,
  directory: string,
  options: SaveTiming,
): Promise<Saving> {
  await makeDirectory(directory);
  return saveTensors(engine, [{ path: join(directory, stateFile), tensors: momentTensors(engine) }], options);
}

/**
 * Reads it back into an engine of the same model; every moment must be there, and nothing else.
 * @throws CHECKPOINT_FILE_MISSING, CHECKPOINT_CORRUPT, CHECKPOINT_TENSOR_MISSING, CHECKPOINT_TENSOR_SHAPE, CHECKPOINT_DTYPE,
 * each naming file and tensor; CHECKPOINT_NOT_FINITE
 */
export async function loadOptimizerState(engine: Engine, directory: string): Promise<void> {
  const file = join(directory, stateFile);
  const stored = await readSafetensorsHeader(file);
  const wanted = momentTensors(engine);
  // All names and shapes are checked before the first tensor is read.
  const tensors = wanted.map((tensor) => momentIn(file, tensor, stored.get(tensor.name)));
  const names = new Set(wanted.map(({ name }) => name));
  const extra = [...stored.keys()].find((name) => !names.has(name));
  if (extra !== undefined) throw foreign('CHECKPOINT_TENSOR_MISSING', file, extra, 'is of no parameter of the model');
  await engine.load(tensors);
}

function momentIn(
  file: string,
  { name, shape, parameter, space }: EngineTensor,
  stored: StoredTensor | undefined,
): FileTensor {
  if (!stored) {
    throw foreign('CHECKPOINT_TENSOR_MISSING', file, name, `[${shape.join(', ')}] is missing`, { expected: shape });
  }
  if (stored.shape.join() !== shape.join()) {
    throw foreign(
      'CHECKPOINT_TENSOR_SHAPE',
      file,
      name,
      `has shape [${stored.shape.join(', ')}], expected [${shape.join(', ')}]`,
      { expected: shape, received: stored.shape },
    );
  }
  if (stored.dtype !== 'F32') {
    const compared = { expected: 'F32', received: stored.dtype };
    throw foreign('CHECKPOINT_DTYPE', file, name, `is ${stored.dtype}, expected F32`, compared);
  }
  return { name: parameter, space, file, offset: stored.offset, dtype: 'F32' };
}

function foreign(
  code: 'CHECKPOINT_TENSOR_MISSING' | 'CHECKPOINT_TENSOR_SHAPE' | 'CHECKPOINT_DTYPE',
  file: string,
  tensor: string,
  what: string,
  compared: Record<string, unknown> = {},
): LockstepError {
  const message = `${file}: tensor "${tensor}" ${what}. The optimizer state belongs to another model.`;
  return new LockstepError(code, message, { file, tensor, ...compared });
}
