/** What the settings of sampling may be. */
import { LockstepError } from '../errors.js';

interface Limit {
  holds: (value: number) => boolean;
  expected: string;
}

const whole = (least: number): Limit => ({
  holds: (value) => Number.isSafeInteger(value) && value >= least,
  expected: `a whole number, at least ${least}`,
});

const limits = {
  temperature: { holds: (x) => Number.isFinite(x) && x >= 0, expected: 'a number, at least 0 (0 is greedy)' },
  topP: { holds: (x) => x > 0 && x <= 1, expected: 'a number above 0 and at most 1 (1 turns it off)' },
  topK: { ...whole(0), expected: 'a whole number, at least 0 (0 turns it off)' },
  seed: { holds: Number.isSafeInteger, expected: 'a whole number' },
  maxNewTokens: whole(1),
  samples: whole(1),
  speculation: { ...whole(0), expected: 'a whole number, at least 0 (0 turns it off)' },
} satisfies Record<string, Limit>;

/**
 * Looks at those settings that are there.
 *
 * @throws LockstepError SAMPLING_INVALID naming the first one that is out of its limits
 */
export function checkSampling(settings: { [Key in keyof typeof limits]?: number | bigint | undefined }): void {
  for (const [key, { holds, expected }] of Object.entries(limits) as [keyof typeof limits, Limit][]) {
    const received = settings[key];
    if (received === undefined || (key === 'seed' && typeof received === 'bigint')) continue;
    if (typeof received === 'number' && holds(received)) continue;
    throw new LockstepError('SAMPLING_INVALID', `${key}: expected ${expected}, received ${String(received)}`, {
      key,
      received,
    });
  }
}
