/** What it means for a run's bits that it goes on in another layout than it had. */
import type { ModelShape } from '../layout/model-shape.js';
import type { Config } from './config.js';
import type { RunWarning } from './loop.js';

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
