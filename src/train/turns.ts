/** Workers of one device use its workspace in turn: a call waits until the one before has ended. */
import type { Recorder } from './recorder.js';

export class Turns {
  #last: Promise<unknown> = Promise.resolve();

  run<T>(work: () => Promise<T>): Promise<T> {
    const turn = this.#last.then(work, work);
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
        if (typeof value !== 'function' || phases[key as keyof T] === undefined) return value;
        return (...args: unknown[]) => turns.run(() => value.apply(object, args) as Promise<unknown>);
      },
    });
  }
}
