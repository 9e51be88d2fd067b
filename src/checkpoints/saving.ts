/** Safetensors files that all ranks of an engine fill together, each complete in its place or absent. */
import { awaitedLater } from '../engine/device.js';
import type { Engine, FileTensor, Saving } from '../engine/engine.js';
import { createPartial, finishPartial, removePartial } from './files.js';
import { float32Size, type NewTensor, safetensorsHeader } from './safetensors.js';

export interface EngineTensor extends NewTensor, Pick<FileTensor, 'space'> {
  /** Of the engine; `name` is that in the file. */
  parameter: string;
}

export interface FileToSave {
  path: string;
  tensors: readonly EngineTensor[];
}

export interface SaveTiming {
  /** Copy the state into host memory first and write behind the caller's back; otherwise everything is written on return. */
  copy?: boolean;
}

/**
 * Writes files in float32 from an engine.
 * @throws CHECKPOINT_WRITE_FAILED with path and cause, here or from `written`; what `Engine.save` throws
 */
export async function saveTensors(engine: Engine, files: readonly FileToSave[], options: SaveTiming): Promise<Saving> {
  const withoutPartials = async <T>(work: () => Promise<T>): Promise<T> => {
    try {
      return await work();
    } catch (error) {
      for (const { path } of files) await removePartial(path);
      throw error;
    }
  };
  const saving = await withoutPartials(async () => {
    const tensors: FileTensor[] = [];
    for (const file of files) tensors.push(...(await createFile(file)));
    return engine.save(tensors, options);
  });
  const written = withoutPartials(async () => {
    await saving.written;
    for (const { path } of files) await finishPartial(path);
  });
  if (options.copy !== true) await written;
  return { copiedBytes: saving.copiedBytes, written: awaitedLater(written) };
}

/** Makes the file as long as it will be, and says where in it the tensors go. */
async function createFile({ path, tensors }: FileToSave): Promise<FileTensor[]> {
  const header = safetensorsHeader(tensors);
  const offsets = [header.byteLength];
  for (const { shape } of tensors) offsets.push((offsets.at(-1) as number) + float32Size(shape));
  const file = await createPartial(path, header, offsets.at(-1) as number);
  return tensors.map(({ parameter, space }, i) => ({
    ...{ name: parameter, space, file, dtype: 'F32' },
    offset: offsets[i] as number,
  }));
}
