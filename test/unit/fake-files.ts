/** How fakes of the engine move whole tensors between themselves and files: one after the other, through JavaScript. */
import { open } from 'node:fs/promises';
import { readBytes, type StoredTensor } from '../../src/checkpoints/safetensors.js';
import type { Engine, FileTensor, Saving } from '../../src/engine/engine.js';

/** One float32 tensor of a file. */
export async function readFloat32({
  file,
  offset,
  bytes,
}: Pick<StoredTensor, 'file' | 'offset' | 'bytes'>): Promise<Float32Array> {
  await using handle = await open(file, 'r');
  const data = new Float32Array(bytes / 4);
  new Uint8Array(data.buffer).set(await readBytes(handle, file, offset, bytes));
  return data;
}

type Tensors = Pick<Engine, 'readTensor' | 'writeTensor'>;

export async function loadFiles(engine: Tensors, tensors: readonly FileTensor[]): Promise<void> {
  for (const { name, space, file, offset } of tensors) {
    const bytes = (await engine.readTensor(name, space)).byteLength;
    await engine.writeTensor(name, await readFloat32({ file, offset, bytes }), space);
  }
}

/** With `copy` all tensors are read before the first byte is written. */
export async function saveFiles(
  engine: Tensors,
  tensors: readonly FileTensor[],
  { copy = false } = {},
): Promise<Saving> {
  const data: Float32Array[] = [];
  for (const { name, space } of tensors) data.push(await engine.readTensor(name, space));
  const write = async () => {
    for (const [i, { file, offset }] of tensors.entries()) {
      await using handle = await open(file, 'r+');
      await handle.write(new Uint8Array(data[i]!.buffer), 0, data[i]!.byteLength, offset);
    }
  };
  const written = write();
  written.catch(() => undefined);
  if (!copy) await written;
  return { copiedBytes: copy ? data.reduce((sum, { byteLength }) => sum + byteLength, 0) : 0, written };
}
