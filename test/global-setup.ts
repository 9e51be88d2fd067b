/** What tests write to the system's temporary folder lies in one folder of the run, which goes when it ends. */
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

export default async function setup(): Promise<() => Promise<void>> {
  const outside = process.env.TMPDIR;
  const folder = await mkdtemp(join(tmpdir(), 'lockstep-tests-'));
  process.env.TMPDIR = folder;
  return async () => {
    if (outside === undefined) delete process.env.TMPDIR;
    else process.env.TMPDIR = outside;
    await rm(folder, { recursive: true, force: true });
  };
}
