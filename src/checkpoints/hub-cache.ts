/** Where a model's files are: a folder, or a hub name in the local Hugging Face cache. Nothing is downloaded. */
import { readdir, stat } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { LockstepError } from '../errors.js';
import { readTextIfPresent } from './files.js';

const hubName = /^[A-Za-z0-9][\w.-]*(\/[A-Za-z0-9][\w.-]*)?$/;

async function isDirectory(path: string): Promise<boolean> {
  return stat(path).then(
    (entry) => entry.isDirectory(),
    () => false,
  );
}

/** The hub cache, by the variables that huggingface_hub reads. */
export function hubCacheDirectory(environment: NodeJS.ProcessEnv = process.env): string {
  const { HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_HOME, XDG_CACHE_HOME } = environment;
  const cache = HF_HUB_CACHE || HUGGINGFACE_HUB_CACHE;
  if (cache) return cache;
  return join(HF_HOME || join(XDG_CACHE_HOME || join(homedir(), '.cache'), 'huggingface'), 'hub');
}

/** The snapshot that `refs/main` names, or the only one there is. */
async function cachedSnapshot(name: string, cache: string): Promise<string | undefined> {
  const repository = join(cache, `models--${name.replace('/', '--')}`);
  const snapshots = join(repository, 'snapshots');
  const commit = (await readTextIfPresent(join(repository, 'refs', 'main')))?.trim();
  if (commit) return (await isDirectory(join(snapshots, commit))) ? join(snapshots, commit) : undefined;
  const found = await readdir(snapshots).catch(() => []);
  return found.length === 1 ? join(snapshots, found[0] as string) : undefined;
}

/**
 * @param model a folder, or a hub name as `org/name`
 * @throws MODEL_NOT_FOUND with the download command
 */
export async function resolveModelDirectory(
  model: string,
  environment: NodeJS.ProcessEnv = process.env,
): Promise<string> {
  if (await isDirectory(model)) return model;
  const cache = hubCacheDirectory(environment);
  if (!hubName.test(model)) {
    const message = `${model}: no such folder. Expected a Hugging Face checkpoint folder (config.json, *.safetensors) or a hub name.`;
    throw new LockstepError('MODEL_NOT_FOUND', message, { model });
  }
  const snapshot = await cachedSnapshot(model, cache);
  if (snapshot !== undefined) return snapshot;
  const message =
    `${model}: neither a folder nor a model in the local Hugging Face cache (${cache}). ` +
    `Download it with: hf download ${model}`;
  throw new LockstepError('MODEL_NOT_FOUND', message, { model, cache, command: `hf download ${model}` });
}
