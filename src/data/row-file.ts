/** Rows in a temporary file, to be read in any order: for formats in which one row can not be read without its neighbours. */
import { randomUUID } from 'node:crypto';
import { writeSync } from 'node:fs';
import { type FileHandle, open, unlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { deserialize, serialize } from 'node:v8';
import type { Columns } from './jsonl.js';

/** Bytes of the file. */
interface Place {
  start: number;
  end: number;
}

export class RowFile {
  #end = 0;

  private constructor(private readonly handle: FileHandle) {}

  /** In the system's temporary folder (`TMPDIR`), without a name there: nothing stays, however the process ends. */
  static async create(): Promise<RowFile> {
    const path = join(tmpdir(), `lockstep-rows-${randomUUID()}`);
    const handle = await open(path, 'wx+', 0o600);
    await unlink(path);
    return new RowFile(handle);
  }

  /** Throws the system's error when there is no room. */
  add(columns: Columns): Place {
    const bytes = serialize(columns);
    const start = this.#end;
    let written = 0;
    while (written < bytes.length) {
      written += writeSync(this.handle.fd, bytes, written, bytes.length - written, start + written);
    }
    this.#end += bytes.length;
    return { start, end: this.#end };
  }

  async read({ start, end }: Place): Promise<Columns> {
    const bytes = Buffer.alloc(end - start);
    await this.handle.read(bytes, 0, bytes.length, start);
    return deserialize(bytes) as Columns;
  }

  close(): Promise<void> {
    return this.handle.close();
  }
}
