/**
 * A value, or a handle to one that is not there yet. Workers take handles, so that data goes from one to the next without passing
 * through the algorithm; what an algorithm awaits it has in its hands.
 */
export type Awaitable<T> = T | PromiseLike<T>;
