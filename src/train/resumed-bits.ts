/** What it means for a run's bits that it goes on in another layout, on other processors, or with other data, than it had. */
import type { ModelShape } from '../layout/model-shape.js';
import type { Config } from './config.js';
import type { Architecture } from './gpus.js';
import type { RunWarning } from './loop.js';
import type { Task } from './task.js';

/** What of `parallel` decides bits; schedules do not. */
export type Layout = Omit<Config['parallel'], 'schedule'>;

/**
 * Whether two layouts train these models to the same bits, at equal parts (DESIGN §2): all pipeline degrees and ZeRO stages do, and all
 * tensor degrees but for head norms, whose gradient is a sum over the ranks of a stage; data degrees do not.
 */
export function sameBits(before: Layout, now: Layout, trained: readonly Pick<ModelShape, 'headNorm'>[]): boolean {
  if (before.data !== now.data) return false;
  return before.tensor === now.tensor || !trained.some(({ headNorm }) => headNorm);
}

/** The warning with which a run continues in a layout that cannot give the bits of the one before. */
export function layoutWarning(
  before: Layout | undefined,
  now: Layout,
  trained: readonly Pick<ModelShape, 'headNorm'>[],
): RunWarning | undefined {
  if (before === undefined || sameBits(before, now, trained)) return undefined;
  const named = ({ pipeline, tensor, data, zero }: Layout) =>
    `pipeline ${pipeline}, tensor ${tensor}, data ${data}, zero ${zero}`;
  const message =
    `the run was in the layout ${named(before)} and continues in ${named(now)}: from here its numbers agree with those of the run ` +
    'never stopped within the bounds of docs/numerics.md, not bit for bit; set parallel back to have the same bits';
  return { code: 'LAYOUT_DIFFERS', message };
}

/**
 * The warning with which a run continues on processors that cannot give the bits of those before: tensor cores of every
 * architecture sum products of bfloat16 in an order of their own; all else has the same bits everywhere.
 */
export function architectureWarning(
  before: Architecture | undefined,
  now: Architecture,
  dtype: Config['dtype'],
): RunWarning | undefined {
  if (before === undefined || dtype === 'float32') return undefined;
  const kinds = ({ gpus }: Architecture) => [...new Set(gpus.map(({ computeCapability }) => computeCapability))].sort();
  if (kinds(before).join() === kinds(now).join()) return undefined;
  const named = ({ gpus }: Architecture) =>
    gpus.length === 0
      ? 'a CPU'
      : gpus.map(({ name, computeCapability }) => `${name} (compute capability ${computeCapability})`).join(' and ');
  const message =
    `the run computed on ${named(before)} and continues on ${named(now)}: in bfloat16 its bits may differ from here on from those of ` +
    'the run never stopped; continue on the same kind of processor to have the same bits';
  return { code: 'ARCHITECTURE_DIFFERS', message };
}

/** The warnings with which a run continues on files that are not what they were. */
export function dataWarnings(before: Task['data'], now: Task['data']): RunWarning[] {
  return Object.entries(now).flatMap(([key, { rows, bytes }]) => {
    const was = before[key];
    if (was === undefined || (was.rows === rows && was.bytes === bytes)) return [];
    const message =
      `the file of ${key} had ${was.rows} rows in ${was.bytes} bytes and has ${rows} in ${bytes}: the run goes on at its position in the ` +
      'new order, so some rows may come again and others not at all in this pass; put the file back to have the bits of the run never stopped';
    return [{ code: 'DATA_DIFFERS', message }];
  });
}
