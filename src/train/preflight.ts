/** What a run needs of its device, added up before anything is allocated, and refused with the arithmetic shown. */
import { generationRows, generationSequences } from '../engine/native-engine.js';
import { LockstepError } from '../errors.js';
import {
  largestCall,
  pagePositions,
  planGeneration,
  planModel,
  planScoring,
  planTraining,
  snapshotBytes,
} from '../layout/memory-plan.js';
import { resolveParts } from '../layout/parts.js';
import { tensorTable } from '../layout/tensor-table.js';
import { type Config, parseBytes } from './config.js';
import type { MemoryLine, MemoryTable } from './events.js';
import type { Role } from './roles.js';

/**
 * The models' weights, gradients and optimizer state, and the largest of the calls that use the workspace in turn.
 *
 * @throws LockstepError MEMORY_BUDGET when they exceed `memory.device`, or copies of checkpoints `memory.host`.
 */
export function preflight(roles: readonly Role[], config: Config): MemoryTable {
  if (config.checkpoint.async) checkCopies(roles, config);
  const budgetBytes = parseBytes(config.memory.device);
  const workspace = roles.flatMap((role) => calls(role, config)).reduce((a, b) => (b.bytes > a.bytes ? b : a));
  const lines = [...roles.flatMap((role) => modelLines(role, config)), workspace];
  const totalBytes = lines.reduce((sum, line) => sum + line.bytes, 0);
  const table = { lines, totalBytes, budgetBytes };
  if (totalBytes <= budgetBytes) return table;
  throw new LockstepError(
    'MEMORY_BUDGET',
    `the run needs ${mebibytes(totalBytes)}, more than memory.device (${mebibytes(budgetBytes)}):\n` +
      lines.map(({ what, bytes }) => `  ${mebibytes(bytes).padStart(12)}  ${what}`).join('\n') +
      '\nraise memory.device, lower batch.microTokens, or set memory.recompute',
    { ...table },
  );
}

/** What `checkpoint.async` copies of all trained models. */
function checkCopies(roles: readonly Role[], config: Config): void {
  const trained = roles.filter((role) => role.trained);
  const bytes = trained.reduce((sum, role) => sum + snapshotBytes(tableOf(role, config)), 0);
  const budgetBytes = parseBytes(config.memory.host);
  if (bytes <= budgetBytes) return;
  throw new LockstepError(
    'MEMORY_BUDGET',
    `a checkpoint of ${trained.map(({ name }) => name).join(' and ')} is copied into ${mebibytes(bytes)} of host memory, more than ` +
      `memory.host (${mebibytes(budgetBytes)}); raise it, or set checkpoint.async to false`,
    { bytes, budgetBytes },
  );
}

const tableOf = ({ shape }: Role, { numerics }: Config) => tensorTable(shape, resolveParts(shape, numerics.parts));

function modelLines(role: Role, config: Config): MemoryLine[] {
  const { name, trained } = role;
  const plan = planModel(tableOf(role, config), config.dtype, trained);
  return [
    { what: `${name}: weights`, bytes: plan.weightsBytes },
    ...(trained
      ? [
          { what: `${name}: gradients`, bytes: plan.gradientBytes },
          { what: `${name}: optimizer`, bytes: plan.optimizerBytes },
        ]
      : []),
  ];
}

/** The largest calls of a model. Generation takes as many pages as there are; it needs those of one sequence. */
function calls({ name, shape, trained, generates }: Role, { dtype, batch, rollout, memory }: Config): MemoryLine[] {
  const rows = batch.microTokens;
  const size = largestCall(rows, batch.sequences);
  const scoring = planScoring(shape, dtype, size).total;
  const training = trained ? planTraining(shape, dtype, size, { recompute: memory.recompute }).total : 0;
  const pages = Math.ceil(Math.min(shape.maxPositions, rows + rollout.maxNewTokens) / pagePositions) + 1;
  const sequences = Math.min(batch.sequences, generationSequences);
  const generation = { rows: Math.max(sequences, generationRows), sequences, pages };
  const generating = generates ? planGeneration(shape, dtype, generation).total : 0;
  return [
    { what: `workspace: ${name}, forward of ${rows} tokens`, bytes: scoring },
    { what: `workspace: ${name}, training on ${rows} tokens`, bytes: training },
    { what: `workspace: ${name}, generation`, bytes: generating },
  ];
}

function mebibytes(bytes: number): string {
  return `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}
