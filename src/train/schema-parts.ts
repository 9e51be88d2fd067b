/** Pieces of the configuration's schema. */
import { z } from 'zod';

export const positive = z.number().positive();
export const nonNegative = z.number().nonnegative();
export const count = z.int().positive();
export const countOrZero = z.int().nonnegative();
export const fraction = z.number().min(0).max(1);
const sizePattern = /^\s*\d+(\.\d+)?\s*(B|KiB|MiB|GiB|TiB|KB|MB|GB|TB)\s*$/;
export const bytes = z.union([count, z.string().regex(sizePattern, 'expected bytes, such as 8GiB, 512MiB or 1000000')]);

/** A section whose keys all have defaults may itself be left out. */
export function section<Shape extends z.ZodRawShape>(shape: Shape) {
  return z.strictObject(shape).prefault({} as never);
}

/** A path, a name. */
export const text = z.string().min(1);
