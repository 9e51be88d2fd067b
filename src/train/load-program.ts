/** Algorithms from files: the iteration that a configuration's `program` names. TypeScript loads through jiti. */
import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import { createJiti } from 'jiti';
import type { RolloutAlgorithm } from '../algorithms/algorithm.js';
import { LockstepError, nearest } from '../errors.js';
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
  const problem = problemOf(made);
  if (problem === undefined) return made as RolloutAlgorithm;
  throw new LockstepError(
    'PROGRAM_EXPORT',
    `the default export of ${file} is no algorithm, nor a function that gives one: ${problem}; expected ` +
      'defineAlgorithm({ models, iterate })',
    { file },
  );
}

const roles: readonly string[] = ['actor', 'critic', 'costCritic', 'reference', 'teacher', 'reward', 'cost'];

/** What keeps a value from being an algorithm. */
function problemOf(value: unknown): string | undefined {
  if (typeof value !== 'object' || value === null) return `it is ${value === null ? 'null' : typeof value}`;
  const { models, iterate, state, restore } = value as Partial<RolloutAlgorithm>;
  if (!Array.isArray(models)) return 'it has no list of models';
  const unknown: unknown = models.find((name: unknown) => !roles.includes(name as string));
  if (unknown !== undefined) {
    const guess = nearest(String(unknown), roles);
    return `there is no model ${unknown}${guess === undefined ? '' : `, did you mean ${guess}?`} (models are ${roles.join(', ')})`;
  }
  if (!models.includes('actor')) return 'its models lack the actor';
  const missing = Object.entries({ iterate, state, restore }).find(([, each]) => typeof each !== 'function');
  return missing && `it has no function ${missing[0]}`;
}
