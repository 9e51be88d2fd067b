/**
 * The safetensors format: 8 bytes little-endian header length, a JSON header, then the tensors without gaps. A header is
 * believed only as far as the file bears it out.
 */
import { type FileHandle, open } from 'node:fs/promises';
import { LockstepError } from '../errors.js';
import { isSystemError, writeAtomically } from './files.js';

export interface StoredTensor {
  file: string;
  dtype: string;
  shape: readonly number[];
  /** First byte, from the start of the file. */
  offset: number;
  bytes: number;
}

const lengthBytes = 8;
const headerAlignment = 8;
/** The format's own limit. */
const largestHeader = 100_000_000;

const bitsOf: Readonly<Record<string, number>> = Object.fromEntries(
  Object.entries({
    4: ['F4'],
    6: ['F6_E2M3', 'F6_E3M2'],
    8: ['BOOL', 'I8', 'U8', 'F8_E4M3', 'F8_E5M2', 'F8_E8M0', 'F8_E4M3FNUZ', 'F8_E5M2FNUZ'],
    16: ['F16', 'BF16', 'I16', 'U16'],
    32: ['F32', 'I32', 'U32'],
    64: ['F64', 'I64', 'U64', 'C64'],
  }).flatMap(([bits, names]) => names.map((name) => [name, Number(bits)])),
);

function corrupt(file: string, what: string, tensor?: string): LockstepError {
  const subject = tensor === undefined ? file : `${file}: tensor "${tensor}"`;
  const message = `${subject}: ${what}. The file is damaged or incomplete: copy or download it again.`;
  return new LockstepError('CHECKPOINT_CORRUPT', message, tensor === undefined ? { file } : { file, tensor });
}

/** A file opened for reading. @throws CHECKPOINT_FILE_MISSING, CHECKPOINT_UNREADABLE */
export async function openForReading(file: string): Promise<FileHandle> {
  try {
    return await open(file, 'r');
  } catch (error) {
    if (!isSystemError(error)) throw error;
    const missing = error.code === 'ENOENT' || error.code === 'ENOTDIR';
    const message = missing
      ? `${file}: no such file. The checkpoint is incomplete: copy or download it again.`
      : `${file}: cannot be read (${error.code}). Check its permissions.`;
    const code = missing ? 'CHECKPOINT_FILE_MISSING' : 'CHECKPOINT_UNREADABLE';
    throw new LockstepError(code, message, { file, cause: error.code }, { cause: error });
  }
}

export async function readBytes(handle: FileHandle, file: string, offset: number, bytes: number): Promise<Buffer> {
  const buffer = Buffer.allocUnsafe(bytes);
  for (let done = 0; done < bytes; ) {
    const { bytesRead } = await handle.read(buffer, done, Math.min(bytes - done, 1 << 30), offset + done);
    if (bytesRead === 0) throw corrupt(file, `it ends at byte ${offset + done}, ${offset + bytes} were expected`);
    done += bytesRead;
  }
  return buffer;
}

/**
 * The tensors of a file, in the order of their bytes.
 * @throws CHECKPOINT_CORRUPT for a truncated file or a header that lies: length, JSON, duplicate names, unknown dtype, shape
 * against bytes, offsets beyond the file, overlaps, gaps; CHECKPOINT_FILE_MISSING.
 */
export async function readSafetensorsHeader(file: string): Promise<Map<string, StoredTensor>> {
  const handle = await openForReading(file);
  try {
    const { size } = await handle.stat();
    if (size < lengthBytes) throw corrupt(file, `it has ${size} bytes, too few for a safetensors file`);
    const length = (await readBytes(handle, file, 0, lengthBytes)).readBigUInt64LE();
    if (length > BigInt(largestHeader)) {
      throw corrupt(file, `its header claims ${length} bytes, more than the ${largestHeader} that the format allows`);
    }
    const dataBegin = lengthBytes + Number(length);
    if (dataBegin > size) throw corrupt(file, `its header claims ${length} bytes, but the file has ${size} in all`);
    const header = await readBytes(handle, file, lengthBytes, Number(length));
    return parseHeader(file, header, dataBegin, size);
  } finally {
    await handle.close();
  }
}

function parseHeader(file: string, header: Buffer, dataBegin: number, fileSize: number): Map<string, StoredTensor> {
  let text: string;
  let json: unknown;
  try {
    text = new TextDecoder('utf-8', { fatal: true }).decode(header);
    json = JSON.parse(text);
  } catch (error) {
    throw corrupt(file, `its header is not JSON (${error instanceof Error ? error.message : String(error)})`);
  }
  if (typeof json !== 'object' || json === null || Array.isArray(json))
    throw corrupt(file, 'its header is not an object');
  const twice = duplicateKey(text);
  if (twice !== undefined) throw corrupt(file, 'it is listed twice in the header', twice);

  const tensors: [string, StoredTensor][] = [];
  for (const [name, entry] of Object.entries(json)) {
    if (name === '__metadata__') checkMetadata(file, entry);
    else tensors.push([name, parseEntry(file, name, entry, dataBegin, fileSize)]);
  }
  // Empty tensors share an offset with a neighbour; they come first.
  tensors.sort(([, a], [, b]) => a.offset - b.offset || a.bytes - b.bytes);
  let end = dataBegin;
  for (const [name, tensor] of tensors) {
    if (tensor.offset < end) throw corrupt(file, `its bytes overlap another tensor's by ${end - tensor.offset}`, name);
    if (tensor.offset > end) throw corrupt(file, `${tensor.offset - end} bytes before it belong to no tensor`, name);
    end = tensor.offset + tensor.bytes;
  }
  if (end !== fileSize) throw corrupt(file, `${fileSize - end} bytes at its end belong to no tensor`);
  return new Map(tensors);
}

function checkMetadata(file: string, entry: unknown): void {
  const isMap = typeof entry === 'object' && entry !== null && !Array.isArray(entry);
  if (isMap && Object.values(entry).every((value) => typeof value === 'string')) return;
  throw corrupt(file, '__metadata__ is not an object of strings');
}

const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;

function parseEntry(file: string, name: string, entry: unknown, dataBegin: number, fileSize: number): StoredTensor {
  const { dtype, shape, data_offsets: offsets } = (entry ?? {}) as Record<string, unknown>;
  const bits = typeof dtype === 'string' && Object.hasOwn(bitsOf, dtype) ? bitsOf[dtype] : undefined;
  if (typeof dtype !== 'string' || bits === undefined)
    throw corrupt(file, `its dtype is ${JSON.stringify(dtype)}`, name);
  if (!Array.isArray(shape) || !shape.every(isCount))
    throw corrupt(file, `its shape is ${JSON.stringify(shape)}`, name);
  if (!Array.isArray(offsets) || offsets.length !== 2 || !offsets.every(isCount) || offsets[0] > offsets[1]) {
    throw corrupt(file, `its data_offsets are ${JSON.stringify(offsets)}`, name);
  }
  const [begin, end] = offsets as [number, number];
  if (dataBegin + end > fileSize) {
    throw corrupt(file, `it ends at byte ${dataBegin + end}, but the file has ${fileSize}`, name);
  }
  const elements = shape.reduce((product: bigint, extent: number) => product * BigInt(extent), 1n);
  if (elements * BigInt(bits) !== BigInt(end - begin) * 8n) {
    throw corrupt(file, `${end - begin} bytes do not hold ${dtype} [${shape.join(', ')}]`, name);
  }
  return { file, dtype, shape: shape as number[], offset: dataBegin + begin, bytes: end - begin };
}

/** The first key that stands twice in the outer object of valid JSON; JSON.parse keeps the last one silently. */
function duplicateKey(text: string): string | undefined {
  const seen = new Set<string>();
  const token = /"(?:[^"\\]|\\.)*"|[{}[\]:,]/g;
  let depth = 0;
  let atKey = false;
  for (let match = token.exec(text); match; match = token.exec(text)) {
    const found = match[0];
    if (found === '{' || found === '[') depth++;
    else if (found === '}' || found === ']') depth--;
    else if (depth === 1 && atKey && found.startsWith('"')) {
      const key = JSON.parse(found) as string;
      if (seen.has(key)) return key;
      seen.add(key);
    }
    atKey = depth === 1 && (found === '{' || found === ',');
  }
  return undefined;
}

export interface NewTensor {
  name: string;
  shape: readonly number[];
}

const float32Bytes = 4;

export const float32Size = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, float32Bytes);

/** Header of a float32 file, its length in front: the tensors in the given order, padded with spaces to 8 bytes. */
export function safetensorsHeader(tensors: readonly NewTensor[]): Uint8Array {
  const header: Record<string, unknown> = { __metadata__: { format: 'pt' } };
  let offset = 0;
  for (const { name, shape } of tensors) {
    const end = offset + float32Size(shape);
    header[name] = { dtype: 'F32', shape, data_offsets: [offset, end] };
    offset = end;
  }
  const json = Buffer.from(JSON.stringify(header));
  const padding = (headerAlignment - (json.length % headerAlignment)) % headerAlignment;
  const length = Buffer.alloc(lengthBytes);
  length.writeBigUInt64LE(BigInt(json.length + padding));
  return Buffer.concat([length, json, Buffer.alloc(padding, ' ')]);
}

/**
 * Writes a float32 file, all or nothing, asking for one tensor at a time.
 * @throws CHECKPOINT_WRITE_FAILED
 */
export async function writeSafetensors(
  file: string,
  tensors: readonly NewTensor[],
  read: (name: string) => Promise<Float32Array>,
): Promise<void> {
  async function* chunks(): AsyncGenerator<Uint8Array> {
    yield safetensorsHeader(tensors);
    for (const { name, shape } of tensors) {
      const data = await read(name);
      if (data.byteLength !== float32Size(shape)) {
        const message = `Tensor "${name}" has ${data.length} elements, but its shape is [${shape.join(', ')}].`;
        throw new LockstepError('CHECKPOINT_TENSOR_SHAPE', message, { tensor: name, shape, received: data.length });
      }
      yield new Uint8Array(data.buffer, data.byteOffset, data.byteLength);
    }
  }
  await writeAtomically(file, chunks());
}
