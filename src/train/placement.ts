/**
 * Which models of a run share a pool of devices (HybridFlow [2409.19256], section 4.1 and Table 1): models of one pool take turns,
 * models of different pools run at the same time. Every model has the run's (pipeline, tensor, data) layout in its pool, so where
 * models lie changes no bit.
 */
import { z } from 'zod';
import { LockstepError, nearest } from '../errors.js';

const placementNames = ['colocated', 'split', 'standalone'] as const;

/** `colocated`: one pool. `split`: policy and reference, and all others. `standalone`: a pool for each. Or lists of models. */
export const placementSchema = z
  .union([z.enum(placementNames), z.array(z.array(z.string().min(1)).min(1)).min(1)])
  .default('colocated');

export type Placement = z.output<typeof placementSchema>;

export interface PlacedRoles<Role extends string = string> {
  /** Its models, such as `critic+reward`. */
  readonly name: string;
  readonly roles: readonly Role[];
}

/** HybridFlow calls the policy actor. */
const aliases: Readonly<Record<string, string>> = { actor: 'policy' };

const groupings: Record<(typeof placementNames)[number], <Role extends string>(roles: readonly Role[]) => Role[][]> = {
  colocated: (roles) => [[...roles]],
  split: (roles) => {
    const withPolicy = (role: string): boolean => role === 'policy' || role === 'reference';
    return [roles.filter(withPolicy), roles.filter((role) => !withPolicy(role))];
  },
  standalone: (roles) => roles.map((role) => [role]),
};

/**
 * The pools of a run with these models, in order.
 * @throws LockstepError CONFIG_CONTRADICTION for a list that names a model that the run has not (with the nearest that it has), leaves
 * one out or names one twice, and for several pools where there is one model
 */
export function poolsOf<Role extends string>(placement: Placement, roles: readonly Role[]): PlacedRoles<Role>[] {
  const groups = typeof placement === 'string' ? groupings[placement](roles) : listed(placement, roles);
  if (roles.length === 1 && typeof placement === 'string' && placement !== 'colocated') {
    throw refused(`'${placement}' divides models, and this run has one (${roles[0]}); use colocated`);
  }
  return groups.filter((group) => group.length > 0).map((group) => ({ name: group.join('+'), roles: group }));
}

function listed<Role extends string>(lists: readonly (readonly string[])[], roles: readonly Role[]): Role[][] {
  const groups = lists.map((names) =>
    names.map((name) => {
      const role = roles.find((each) => each === (aliases[name] ?? name));
      if (role !== undefined) return role;
      const guess = nearest(name, [...roles, ...Object.keys(aliases)]);
      const hint = guess === undefined ? '' : `did you mean ${guess}? `;
      throw refused(`this run has no model ${name}; ${hint}its models are ${roles.join(', ')}`);
    }),
  );
  const placed = groups.flat();
  const twice = placed.find((role, i) => placed.indexOf(role) < i);
  if (twice !== undefined) throw refused(`${twice} is in two places; name each model once`);
  const missing = roles.filter((role) => !placed.includes(role));
  if (missing.length > 0) throw refused(`${missing.join(' and ')} has no place; name each model of the run once`);
  return groups;
}

function refused(problem: string): LockstepError {
  return new LockstepError('CONFIG_CONTRADICTION', `placement: ${problem}`, { path: 'placement' });
}
