/** What a user sees for wrong input: the message names the thing, the exit code its kind, and there is no stack trace. */
import { chmod, cp, mkdir, readdir, readFile, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import {
  configFile,
  lockstep,
  type StartOptions,
  smallModel,
  start,
  temporary,
  tokenRows,
  writeRows,
} from './train-process.js';

let folder: string;
let count = 0;
beforeAll(async () => {
  folder = await temporary();
  await writeRows(join(folder, 'good.jsonl'), tokenRows(16, 256));
});

async function expectFailure(
  args: readonly string[],
  code: number,
  messages: readonly (string | RegExp)[],
  options?: StartOptions,
): Promise<void> {
  const ended = await lockstep(args, options);
  const text = ended.stderr + ended.stdout;
  expect([ended.code, text]).toEqual([code, expect.any(String)]);
  for (const message of messages) expect(text).toMatch(message);
  expect(text).not.toMatch(/^\s+at /m);
}

/** A copy of the small model with a file changed. */
async function brokenModel(file: string, change: (bytes: Buffer) => Buffer | string): Promise<string> {
  const copy = join(folder, `model-${count++}`);
  await cp(smallModel, copy, { recursive: true });
  await chmod(join(copy, file), 0o644);
  await writeFile(join(copy, file), change(await readFile(join(copy, file))));
  return copy;
}

const changedConfig = (changes: object) =>
  brokenModel('config.json', (bytes) => JSON.stringify({ ...JSON.parse(bytes.toString()), ...changes }));

/** Rewrites the header of a safetensors file. */
function withHeader(
  bytes: Buffer,
  change: (header: Record<string, { data_offsets: [number, number]; shape: number[] }>) => void,
): Buffer {
  const size = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, 8 + size).toString());
  change(header);
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([length, text, bytes.subarray(8 + size)]);
}

const norm = 'model.norm.weight';

async function sft(changes: object = {}): Promise<string> {
  const config = {
    algorithm: 'sft',
    model: smallModel,
    data: { train: join(folder, 'good.jsonl') },
    batch: { sequences: 4, microTokens: 512 },
    steps: 1,
    output: join(folder, `run-${count++}`),
    ...changes,
  };
  return configFile(folder, config, `config-${count++}.json`);
}

describe('a model', () => {
  const score = async (model: string) => ['score', model, '--input', join(folder, 'good.jsonl')];

  it('that is missing', async () => {
    await mkdir(join(folder, 'none'));
    await expectFailure(await score(join(folder, 'none')), 1, [/config\.json/]);
  });
  it('without weights', async () => {
    await mkdir(join(folder, 'weightless'));
    await cp(join(smallModel, 'config.json'), join(folder, 'weightless', 'config.json'));
    await expectFailure(await score(join(folder, 'weightless')), 1, [/model\.safetensors/]);
  });
  it('with truncated weights', async () => {
    const model = await brokenModel('model.safetensors', (bytes) => bytes.subarray(0, bytes.length - 1000));
    await expectFailure(await score(model), 1, [/model\.safetensors/]);
  });
  it.each([
    ['offsets beyond the file', (entry: { data_offsets: [number, number] }) => (entry.data_offsets = [0, 2 ** 50])],
    ['a huge count', (entry: { shape: number[] }) => (entry.shape = [2 ** 52, 2 ** 52])],
    ['the wrong shape', (entry: { shape: number[] }) => (entry.shape = [...entry.shape, 1])],
  ] as const)('whose header lies: %s', async (_, change) => {
    const model = await brokenModel('model.safetensors', (bytes) =>
      withHeader(bytes, (h) => change(h[norm]! as never)),
    );
    await expectFailure(await score(model), 1, [/model\.safetensors/, norm]);
  });
  it('whose tensors overlap', async () => {
    const model = await brokenModel('model.safetensors', (bytes) =>
      withHeader(bytes, (header) => {
        const other = Object.keys(header).find((name) => name.endsWith('input_layernorm.weight'))!;
        header[norm]!.data_offsets = header[other]!.data_offsets;
      }),
    );
    await expectFailure(await score(model), 1, [/model\.safetensors/, /overlap/i]);
  });
  it('that holds NaN', async () => {
    const model = await brokenModel('model.safetensors', (bytes) => {
      const size = Number(bytes.readBigUInt64LE(0));
      const header = JSON.parse(bytes.subarray(8, 8 + size).toString());
      bytes.writeFloatLE(Number.NaN, 8 + size + header[norm].data_offsets[0]);
      return bytes;
    });
    await expectFailure(await score(model), 1, [norm, /NaN|finite/i]);
  });
  it('of an unknown architecture', async () => {
    await expectFailure(await score(await changedConfig({ architectures: ['FooForCausalLM'], model_type: 'foo' })), 1, [
      /foo/,
    ]);
  });
});

describe('data', () => {
  const run = async (data: object, changes: object = {}) => ['train', await sft({ data, ...changes })];

  it('that is missing', async () =>
    expectFailure(await run({ train: join(folder, 'nope.jsonl') }), 1, [/nope\.jsonl/]));
  it('that is empty', async () => {
    await writeFile(join(folder, 'empty.jsonl'), '\n');
    await expectFailure(await run({ train: join(folder, 'empty.jsonl') }), 1, [/empty\.jsonl/, /no rows/]);
  });
  it('with a malformed line', async () => {
    await writeFile(join(folder, 'bad.jsonl'), '{"tokens":[1,2,3]}\n{oops\n');
    await expectFailure(await run({ train: join(folder, 'bad.jsonl') }), 1, [/bad\.jsonl/, /line 2/]);
  });
  it('with a token outside the vocabulary', async () => {
    const input = await writeRows(join(folder, 'range.jsonl'), [{ tokens: [1, 99999] }]);
    await expectFailure(['score', smallModel, '--input', input], 1, [/99999/, /line 1/]);
    await expectFailure(await run({ train: input }), 1, [/99999/, /line 1/]);
  });
  it('with a prompt beyond the context', async () => {
    const positions = JSON.parse(await readFile(join(smallModel, 'config.json'), 'utf8')).max_position_embeddings;
    const input = await writeRows(join(folder, 'long.jsonl'), [
      { tokens: [5] },
      { tokens: Array(positions + 1).fill(5) },
    ]);
    await expectFailure(['generate', smallModel, '--input', input, '--max-new-tokens', '4'], 1, [
      /line 2/,
      `${positions}`,
    ]);
  });
});

describe('a configuration', () => {
  it.each([
    [{ optimiser: {} }, [/optimiser/, /optimizer/]],
    [{ steps: 'many' }, [/steps/, /many/]],
    [{ algorithm: 'grop' }, [/grop/, /grpo/]],
    [{ parallel: { tensor: 2 } }, [/parallel\.tensor/]],
    [{ algorithm: 'ppo', reward: { function: 'r.ts' }, batch: { sequences: 2 } }, [/miniBatches/, /sequences/]],
  ])('that is wrong: %j', async (changes, messages) => {
    await expectFailure(['train', await sft(changes)], 2, messages);
  });
  it('that is no file', async () => expectFailure(['train', join(folder, 'no.yaml')], 2, [/no\.yaml/]));
  it('with a wrong --set', async () =>
    expectFailure(['train', await sft(), '--set', 'optimizer.lr=1'], 2, [/optimizer\.lr/]));
});

describe('a run', () => {
  it('into a folder that holds one', async () => {
    const config = await sft();
    expect((await lockstep(['train', config])).code).toBe(0);
    await expectFailure(['train', config], 1, [/--resume/]);
  });

  it('into the folder of a live one', async () => {
    const config = await sft({ steps: 100000, checkpoint: { every: 0 } });
    const { child, ended, output } = start(['train', config, '--json']);
    while (output() === '') await new Promise((resolve) => setTimeout(resolve, 20));
    await expectFailure(['train', config, '--resume'], 1, [/in use by process/, `${child.pid}`]);
    child.kill('SIGKILL');
    await ended;
  });

  it('that needs more than its budget', async () =>
    expectFailure(['train', await sft({ memory: { device: '1MiB' } })], 1, [/memory\.device/, /policy: optimizer/]));

  it('whose disk is full', async () => {
    const output = join(folder, 'full');
    const config = await sft({ output });
    await expectFailure(['train', config], 1, [/step-000001|model\.safetensors|optimizer\.safetensors/], {
      fileKibibytes: 64,
    });
    expect(await readdir(join(output, 'checkpoints'))).toEqual([]);
    expect((await lockstep(['train', config, '--resume'])).code).toBe(0);
  });

  it('whose output cannot be written', async () => {
    await writeFile(join(folder, 'occupied'), '');
    await expectFailure(['train', await sft({ output: join(folder, 'occupied', 'run') })], 1, [/occupied/, /writable/]);
  });

  it('whose output becomes read-only before the checkpoint', async () => {
    const output = join(folder, 'read-only');
    const config = await sft({ output, steps: 200, checkpoint: { every: 100 } });
    if (process.getuid?.() === 0) return expectReadOnlyMount(output, config);
    const { ended, output: printed } = start(['train', config, '--json']);
    while (printed() === '') await new Promise((resolve) => setTimeout(resolve, 5));
    await chmod(output, 0o555);
    const { code, stderr } = await ended;
    await chmod(output, 0o755);
    expect([code, stderr]).toEqual([1, expect.stringMatching(/EACCES|permission/i)]);
  });
});

/** Root may write anywhere, so its read-only folder is a file in the checkpoint's place. */
async function expectReadOnlyMount(output: string, config: string): Promise<void> {
  const { ended, output: printed } = start(['train', config, '--json']);
  while (printed() === '') await new Promise((resolve) => setTimeout(resolve, 5));
  await writeFile(join(output, 'checkpoints', 'step-000100'), '');
  const { code, stderr } = await ended;
  expect([code, stderr]).toEqual([1, expect.stringMatching(/step-000100/)]);
}

describe('a reward function', () => {
  const run = async (name: string, source: string) => {
    await writeFile(join(folder, name), source);
    const reward = { function: join(folder, name), timeoutSeconds: 1 };
    const rollout = { maxNewTokens: 4 };
    return ['train', await sft({ algorithm: 'ppo', reward, rollout, ppo: { miniBatches: 2 } })];
  };
  it.each([
    ['throws', "export default () => { throw new Error('no idea'); };", [/sample 0/, /no idea/]],
    ['gives NaN', 'export default (samples) => samples.map((_, i) => (i === 2 ? NaN : 1));', [/sample 2/, /NaN/]],
    ['gives too few', 'export default () => [1];', [/4 rewards/]],
    ['never returns', 'export default () => new Promise(() => {});', [/1 s/]],
    ['blocks', 'export default () => { for (;;); };', [/1 s/]],
  ])('that %s', async (name, source, messages) => {
    await expectFailure(await run(`${name.replaceAll(' ', '-')}.mjs`, source), 1, messages);
  });
  it('that is missing', async () => {
    await expectFailure(['train', await sft({ algorithm: 'ppo', reward: { function: 'absent.ts' } })], 1, [
      /absent\.ts/,
    ]);
  });
});

it('an instruction set that the CPU lacks is refused', async () => {
  await expectFailure(['score', smallModel, '--input', join(folder, 'good.jsonl')], 1, [/LOCKSTEP_ISA/], {
    environment: { LOCKSTEP_ISA: 'avx1024' },
  });
});
