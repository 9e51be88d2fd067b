/** Small safetensors files, right and wrong, for tests of checkpoints. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { onTestFinished } from 'vitest';
import type { Engine, FileTensor, ParameterSpace, Saving } from '../../src/engine/engine.js';
import type { ModelShape } from '../../src/layout/model-shape.js';
import { tensorTable } from '../../src/layout/tensor-table.js';
import { loadFiles, saveFiles } from './fake-files.js';

export type Json = Record<string, unknown>;

export function temporaryDirectory(): string {
  const directory = mkdtempSync(join(tmpdir(), 'lockstep-'));
  onTestFinished(() => rmSync(directory, { recursive: true, force: true }));
  return directory;
}

/** A file from a header (an object or its text) and a number of data bytes. */
export function rawSafetensors(header: Json | string, dataBytes: number, claimedLength?: bigint): Buffer {
  const text = Buffer.from(typeof header === 'string' ? header : JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(claimedLength ?? BigInt(text.length));
  return Buffer.concat([length, text, Buffer.alloc(dataBytes)]);
}

/** Writes float32 tensors filled by `value(name, index)`. */
export function writeTensors(
  file: string,
  tensors: readonly { name: string; shape: readonly number[] }[],
  value: (name: string, index: number) => number = () => 0,
): void {
  const header: Json = {};
  const chunks: Float32Array[] = [];
  let offset = 0;
  for (const { name, shape } of tensors) {
    const data = Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => value(name, i));
    header[name] = { dtype: 'F32', shape, data_offsets: [offset, offset + data.byteLength] };
    offset += data.byteLength;
    chunks.push(data);
  }
  const head = rawSafetensors(header, 0);
  writeFileSync(file, Buffer.concat([head, ...chunks.map((chunk) => Buffer.from(chunk.buffer))]));
}

/** Tensors of a model as its checkpoint stores them. */
export const tensorsOf = (shape: ModelShape, parts = 1) => tensorTable(shape, parts).flatMap((spec) => spec.sources);

/** An engine that only remembers its parameters. */
export class MemoryEngine implements Pick<Engine, 'shape' | 'parts' | 'readTensor' | 'writeTensor' | 'load' | 'save'> {
  readonly values = new Map<string, Float32Array>();

  constructor(
    readonly shape: ModelShape,
    readonly parts = 1,
    value: (space: ParameterSpace, name: string, index: number) => number = () => 0,
  ) {
    for (const space of ['weights', 'moment1', 'moment2'] as const) {
      for (const { name, shape: extents } of tensorsOf(shape, parts)) {
        const length = extents.reduce((a, b) => a * b, 1);
        this.values.set(
          `${space} ${name}`,
          Float32Array.from({ length }, (_, i) => value(space, name, i)),
        );
      }
    }
  }

  async readTensor(name: string, space: ParameterSpace = 'weights'): Promise<Float32Array> {
    const value = this.values.get(`${space} ${name}`);
    if (!value) throw new Error(`no ${space} ${name}`);
    return value.slice();
  }

  async writeTensor(name: string, data: Float32Array, space: ParameterSpace = 'weights'): Promise<void> {
    if (this.values.get(`${space} ${name}`)?.length !== data.length) throw new Error(`wrong ${space} ${name}`);
    this.values.set(`${space} ${name}`, data);
  }

  load(tensors: readonly FileTensor[]): Promise<void> {
    return loadFiles(this, tensors);
  }

  save(tensors: readonly FileTensor[], options: { copy?: boolean } = {}): Promise<Saving> {
    return saveFiles(this, tensors, options);
  }

  /** The same object under the full interface; only the methods above work. */
  asEngine(): Engine {
    return this as unknown as Engine;
  }
}
