/** Adam's moments beside a saved model: `moment1.<name>` and `moment2.<name>`, float32, in the layout of the checkpoint. */
import { join } from 'node:path';
import type { Engine } from '../engine/engine.js';
import { LockstepError } from '../errors.js';
import { makeDirectory } from './files.js';
import { checkpointTensors } from './hugging-face.js';
import { type NewTensor, readFloat32, readSafetensorsHeader, writeSafetensors } from './safetensors.js';

const stateFile = 'optimizer.safetensors';
const moments = ['moment1', 'moment2'] as const;

type Moment = (typeof moments)[number];

interface MomentTensor extends NewTensor {
  moment: Moment;
  parameter: string;
}

function momentTensors(engine: Engine): MomentTensor[] {
  const tensors = checkpointTensors(engine);
  return moments.flatMap((moment) =>
    tensors.map(({ name, shape }) => ({ name: `${moment}.${name}`, shape, moment, parameter: name })),
  );
}

/** Writes `optimizer.safetensors`. @throws CHECKPOINT_WRITE_FAILED */
export async function saveOptimizerState(engine: Engine, directory: string): Promise<void> {
  const tensors = momentTensors(engine);
  const byName = new Map(tensors.map((tensor) => [tensor.name, tensor]));
  await makeDirectory(directory);
  await writeSafetensors(join(directory, stateFile), tensors, (name) => {
    const { parameter, moment } = byName.get(name) as MomentTensor;
    return engine.readTensor(parameter, moment);
  });
}

/**
 * Reads it back into an engine of the same model; every moment must be there, and nothing else.
 * @throws CHECKPOINT_FILE_MISSING, CHECKPOINT_CORRUPT, CHECKPOINT_TENSOR_MISSING, CHECKPOINT_TENSOR_SHAPE
 */
export async function loadOptimizerState(engine: Engine, directory: string): Promise<void> {
  const file = join(directory, stateFile);
  const stored = await readSafetensorsHeader(file);
  const wanted = momentTensors(engine);
  const fail = (code: 'CHECKPOINT_TENSOR_MISSING' | 'CHECKPOINT_TENSOR_SHAPE', name: string, what: string) =>
    new LockstepError(code, `${file}: tensor "${name}" ${what}. The optimizer state belongs to another model.`, {
      file,
      tensor: name,
    });
  // All names and shapes are checked before the first tensor is written.
  for (const { name, shape } of wanted) {
    const tensor = stored.get(name);
    if (!tensor) throw fail('CHECKPOINT_TENSOR_MISSING', name, 'is missing');
    if (tensor.shape.join() !== shape.join()) {
      throw fail(
        'CHECKPOINT_TENSOR_SHAPE',
        name,
        `has shape [${tensor.shape.join(', ')}], expected [${shape.join(', ')}]`,
      );
    }
  }
  const names = new Set(wanted.map(({ name }) => name));
  const extra = [...stored.keys()].find((name) => !names.has(name));
  if (extra !== undefined) throw fail('CHECKPOINT_TENSOR_MISSING', extra, 'is of no parameter of the model');
  for (const { name, parameter, moment } of wanted) {
    const data = await readFloat32(name, stored.get(name) as NonNullable<ReturnType<typeof stored.get>>);
    await engine.writeTensor(parameter, data, moment);
  }
}
