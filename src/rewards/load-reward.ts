/** Reward functions from files. TypeScript and JavaScript load through jiti, as Node 20 cannot import TypeScript. */
import { existsSync } from 'node:fs';
import { resolve } from 'node:path';
import { createJiti } from 'jiti';
import { LockstepError } from '../errors.js';
import type { RewardFunction } from './reward-function.js';

/** Exports as they are written, the file as it is now, nothing written to disk. */
const jitiOptions = { interopDefault: false, moduleCache: false, fsCache: false };

/**
 * Loads the reward function of a file into this thread: `path`, or `path#name` for a named export. Without a name it is the
 * default export, else the export `reward`, else the only exported function. Throws `REWARD_FILE_MISSING`,
 * `REWARD_FILE_BROKEN` (it does not load) or `REWARD_EXPORT` (no such function).
 */
export async function loadReward(specifier: string): Promise<RewardFunction> {
  const { file, name } = parse(specifier);
  let exported: Record<string, unknown>;
  try {
    exported = await createJiti(import.meta.url, jitiOptions).import<Record<string, unknown>>(file);
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new LockstepError(
      'REWARD_FILE_BROKEN',
      `The reward file ${file} does not load: ${reason}`,
      { file },
      { cause },
    );
  }
  const functions = Object.keys(exported).filter((key) => typeof exported[key] === 'function');
  const [only] = functions;
  const chosen = name ?? ['default', 'reward'].find((key) => functions.includes(key)) ?? only;
  const ambiguous =
    name === undefined && chosen === only && chosen !== 'default' && chosen !== 'reward' && functions.length > 1;
  if (chosen === undefined || ambiguous || !functions.includes(chosen)) {
    throw new LockstepError(
      'REWARD_EXPORT',
      `The reward file ${file} exports ${functions.length > 0 ? `the functions ${functions.join(', ')}` : 'no function'}, but ` +
        `${name === undefined ? 'a default export or one named "reward"' : `"${name}"`} was expected. Export it, or name ` +
        'one with path#name.',
      { file, functions },
    );
  }
  return exported[chosen] as RewardFunction;
}

function parse(specifier: string): { file: string; name: string | undefined } {
  const whole = resolve(specifier);
  const hash = specifier.lastIndexOf('#');
  const split = hash > 0 && !existsSync(whole);
  const file = split ? resolve(specifier.slice(0, hash)) : whole;
  if (!existsSync(file)) {
    throw new LockstepError(
      'REWARD_FILE_MISSING',
      `There is no reward file ${file}. Paths are relative to the current directory; check reward.function.`,
      { file },
    );
  }
  return { file, name: split ? specifier.slice(hash + 1) : undefined };
}
