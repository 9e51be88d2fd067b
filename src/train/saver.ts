/**
 * The checkpoints of a run, one at a time: begun after a step, written behind the next ones, waited for before the next save and at
 * the end. Training stands still only while the state is copied (all the time without `checkpoint.async`).
 */
import { awaitedLater } from '../engine/device.js';
import { beginSaving } from './checkpoint.js';
import type { TrainEvent } from './events.js';
import type { Run } from './loop.js';

type CheckpointEvent = Extract<TrainEvent, { type: 'checkpoint' }>;

export class Saver {
  #flight: { event: Promise<CheckpointEvent>; ended: boolean } | undefined;

  constructor(private readonly run: Run) {}

  /** Begins to save the state after `step`; the save before has ended. @throws CHECKPOINT_WRITE_FAILED */
  async begin(step: number): Promise<void> {
    const { config, folder, recorder, task } = this.run;
    const start = performance.now();
    const since = () => (performance.now() - start) / 1000;
    const fill = (directory: string) => beginSaving(task, config, step, directory);
    const { directory, copiedBytes, written } = await recorder.phase('checkpoint', async () => {
      const begun = await folder.beginCheckpoint(step, config.checkpoint.keep, fill);
      if (!config.checkpoint.async) await begun.written;
      return begun;
    });
    const waitedSeconds = since();
    // The row of this step is written before the checkpoint, so its time is in the event and the trace only.
    recorder.forgetSeconds();
    await recorder.flush();
    const event = recorder
      .phase('checkpoint files', () => written, 'background')
      .then(() => ({ type: 'checkpoint', step, directory, seconds: since(), waitedSeconds, copiedBytes }) as const);
    const flight = { event: awaitedLater(event), ended: false };
    const end = () => {
      flight.ended = true;
    };
    event.then(end, end);
    this.#flight = flight;
  }

  /** The event of a save that has ended since. @throws CHECKPOINT_WRITE_FAILED when it failed. */
  async ended(): Promise<CheckpointEvent | undefined> {
    return this.#flight?.ended ? this.wait() : undefined;
  }

  /** The same, and waits for a save that has not ended. */
  async wait(): Promise<CheckpointEvent | undefined> {
    const flight = this.#flight;
    this.#flight = undefined;
    return flight?.event;
  }
}
