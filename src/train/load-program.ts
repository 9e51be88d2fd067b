/** Algorithms from files: the iteration that a configuration's `program` names. TypeScript loads through jiti. */
import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import { createJiti } from 'jiti';
import type { RolloutAlgorithm } from '../algorithms/algorithm.js';
import { LockstepError } from '../errors.js';
import type { RolloutConfig } from './config.js';

/** Exports as they are written; packages of the process itself are shared. */
const jitiOptions = { interopDefault: false, moduleCache: true, fsCache: false };

/**
 * The default export of a file: an algorithm (`defineAlgorithm`), or a function that makes one of the run's configuration.
 * @throws LockstepError PROGRAM_MISSING, PROGRAM_BROKEN (it does not load), PROGRAM_EXPORT (no algorithm)
 */
export async function loadProgram(path: string, config: RolloutConfig): Promise<RolloutAlgorithm> {
  const file = resolve(path);
  if (!existsSync(file)) {
    throw new LockstepError(
      'PROGRAM_MISSING',
      `there is no file ${file}; paths are relative to the current directory; check program`,
      { file },
    );
  }
  let exported: { default?: unknown };
  let made: unknown;
  try {
    exported = await createJiti(import.meta.url, jitiOptions).import<{ default?: unknown }>(file);
    made = typeof exported.default === 'function' ? await exported.default(config) : exported.default;
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new LockstepError('PROGRAM_BROKEN', `the program ${file} does not load: ${reason}`, { file }, { cause });
  }
  if (isAlgorithm(made)) return made;
  throw new LockstepError(
    'PROGRAM_EXPORT',
    `the default export of ${file} is no algorithm, nor a function that gives one: expected defineAlgorithm({ models, iterate }) with ` +
      `models among ${roles.join(', ')}`,
    { file },
  );
}

const roles: readonly string[] = ['actor', 'critic', 'costCritic', 'reference', 'teacher', 'reward', 'cost'];

function isAlgorithm(value: unknown): value is RolloutAlgorithm {
  if (typeof value !== 'object' || value === null) return false;
  const { models, iterate, state, restore } = value as Partial<RolloutAlgorithm>;
  const functions = [iterate, state, restore].every((each) => typeof each === 'function');
  return functions && Array.isArray(models) && models.includes('actor') && models.every((name) => roles.includes(name));
}
