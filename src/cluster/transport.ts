/** How a call reaches a rank and its answer comes back. */

/** A call of one rank. */
export interface RankCall {
  readonly group: string;
  readonly method: string;
  readonly rank: number;
  /** As the caller holds them: the first is the rank's part, the others are broadcast. */
  readonly args: readonly unknown[];
  /** Whether the answer is collected; one that is not need not travel. */
  readonly answers: boolean;
  /** Fires when the call is to end: another rank of it has failed, or what it is part of has ended. */
  readonly signal: AbortSignal;
}

export interface Transport {
  /** Bytes of arrays copied so far, of arguments and answers. */
  readonly bytesCopied: number;
  /**
   * Answers a call as the caller sees it, or rejects. `run` calls the rank's worker in this process, on arguments as the rank
   * sees them.
   */
  call(call: RankCall, run: (args: readonly unknown[]) => Promise<unknown>): Promise<unknown>;
}

/** Ranks of this process share the caller's memory: nothing is copied. */
export const inProcess: Transport = {
  bytesCopied: 0,
  call: ({ args }, run) => run(args),
};
