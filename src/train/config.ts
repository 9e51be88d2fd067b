/**
 * Configurations: read, checked, completed with defaults, printed. Relative paths inside a configuration are relative to
 * the current directory of the process, as on a command line; `lockstep train some/where/config.yaml` does not change it.
 */
import { readFile } from 'node:fs/promises';
import { parse as parseYaml, stringify } from 'yaml';
import { z } from 'zod';
import { LockstepError } from '../errors.js';
import { explainIssues } from './config-errors.js';
import { withPreset } from './presets.js';
import { checkRules } from './rules.js';
import { type Config, type ConfigInput, configSchema } from './schema.js';

export type { Config, ConfigInput, ConfigOf, PreferenceConfig, RolloutConfig } from './schema.js';

/** Types a configuration in an editor; the identity. `train()` checks it and completes it. */
export function defineConfig(config: ConfigInput): ConfigInput {
  return config;
}

/**
 * Checks a configuration of any origin and completes it with defaults. A parsed configuration parses to itself.
 *
 * @throws LockstepError CONFIG_UNKNOWN_KEY, CONFIG_INVALID (type or range), CONFIG_CONTRADICTION (keys that exclude each
 * other), CONFIG_UNSUPPORTED (named by the contract, absent from this version). All problems found are in one message.
 */
export function parseConfig(input: unknown): Config {
  const parsed = configSchema.safeParse(withPreset(input));
  if (!parsed.success) throw explainIssues(parsed.error.issues, input);
  checkRules(parsed.data);
  return parsed.data;
}

/** Reads a YAML or JSON file, applies `path=value` settings (values are YAML), and parses the result. */
export async function loadConfig(path: string, sets: readonly string[] = []): Promise<Config> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (cause) {
    throw new LockstepError(
      'CONFIG_FILE_MISSING',
      `cannot read the configuration ${path}: ${(cause as Error).message}; give the path of a YAML or JSON file`,
      { path },
      { cause },
    );
  }
  const tree = readYaml(text, path) ?? {};
  if (typeof tree !== 'object' || Array.isArray(tree)) {
    throw new LockstepError('CONFIG_INVALID', `${path}: expected an object of settings, received ${kindOf(tree)}`, {
      path,
    });
  }
  for (const set of sets) applySetting(tree as Record<string, unknown>, set);
  return parseConfig(tree);
}

/** A resolved configuration as YAML that `loadConfig` reads back to the same object. */
export function printConfig(config: Config): string {
  return stringify(config, { aliasDuplicateObjects: false });
}

/** JSON Schema (2020-12) of what a user writes, for editors. */
export function configJsonSchema(): Record<string, unknown> {
  return z.toJSONSchema(configSchema, { io: 'input' }) as Record<string, unknown>;
}

/** Bytes of a size such as `8GiB`; numbers are bytes already. */
export function parseBytes(size: number | string): number {
  if (typeof size === 'number') return size;
  const [, amount, unit] = /^\s*([\d.]+)\s*([A-Za-z]+)\s*$/.exec(size)!;
  const powers: Record<string, number> = {
    B: 1,
    KiB: 2 ** 10,
    MiB: 2 ** 20,
    GiB: 2 ** 30,
    TiB: 2 ** 40,
    KB: 1e3,
    MB: 1e6,
    GB: 1e9,
    TB: 1e12,
  };
  return Math.floor(Number(amount) * powers[unit!]!);
}

function readYaml(text: string, where: string): unknown {
  try {
    return parseYaml(text);
  } catch (cause) {
    throw new LockstepError(
      'CONFIG_SYNTAX',
      `${where}: not YAML or JSON: ${(cause as Error).message.split('\n')[0]}`,
      { where },
      { cause },
    );
  }
}

/** `ppo.clip=0.1` sets tree.ppo.clip to 0.1; objects on the way are made. */
function applySetting(tree: Record<string, unknown>, setting: string): void {
  const equals = setting.indexOf('=');
  const path = setting.slice(0, equals).trim().split('.');
  if (equals < 1 || path.some((key) => key === '')) {
    throw new LockstepError(
      'USAGE_SET',
      `--set ${setting}: expected path=value, such as --set optimizer.learningRate=1e-5`,
      { setting },
    );
  }
  let node = tree;
  for (const key of path.slice(0, -1)) {
    const next = Object.hasOwn(node, key) ? node[key] : undefined;
    if (next === undefined || next === null) define(node, key, {});
    else if (typeof next !== 'object' || Array.isArray(next)) {
      throw new LockstepError('USAGE_SET', `--set ${setting}: ${key} is ${kindOf(next)}, which has no keys`, {
        setting,
      });
    }
    node = node[key] as Record<string, unknown>;
  }
  define(node, path.at(-1)!, readYaml(setting.slice(equals + 1), `--set ${setting}`));
}

/** An own property whatever its name: `__proto__` becomes an unknown key like any other. */
function define(node: Record<string, unknown>, key: string, value: unknown): void {
  Object.defineProperty(node, key, { value, enumerable: true, configurable: true, writable: true });
}

function kindOf(value: unknown): string {
  return value === null ? 'null' : Array.isArray(value) ? 'a list' : `a ${typeof value}`;
}
