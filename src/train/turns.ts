/** Workers of one device use its workspace in turn: a call waits until the one before has ended. */
import type { Recorder } from './recorder.js';
import type { Rotation } from './rotation.js';

export class Turns {
  #last: Promise<unknown> = Promise.resolve();

  /** With a rotation the models share memory, too: a turn starts when what its phase needs is on the device. */
  constructor(readonly rotation?: Rotation) {}

  run<T>(phase: string, work: () => Promise<T>): Promise<T> {
    const start = async (): Promise<T> => {
      await this.rotation?.enter(phase);
      return work();
    };
    const turn = this.#last.then(start, start);
    this.#last = turn;
    return turn;
  }

  /** An object whose listed methods take turns and are timed as phases. */
  wrap<T extends object>(target: T, phases: Partial<Record<keyof T, string>>, recorder: Recorder): T {
    const timed = recorder.wrap(target, phases);
    const turns = this;
    return new Proxy(timed, {
      get(object, key) {
        const value = Reflect.get(object, key, object) as unknown;
        const phase = phases[key as keyof T];
        if (typeof value !== 'function' || phase === undefined) return value;
        // The turn is taken now; what the call is given may be the future of an earlier one.
        return (...args: unknown[]) =>
          turns.run(phase, async () => value.apply(object, await Promise.all(args)) as Promise<unknown>);
      },
    });
  }
}
