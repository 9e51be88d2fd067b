/**
 * The 3D-HybridEngine (HybridFlow [2409.19256], section 5): the ranks of one training layout generate in another. A training
 * replica is d_g generation replicas, each a model of its own over (p_g, t_g) ranks whose weights are views into the ranks'
 * generation buffers. Prompts are spread over all replicas and responses gathered in their order (Figure 7); a response is a
 * function of weights, prompt, settings, seed and id, so layouts give the same bits.
 */
import { generationGroups, placeInGeneration } from '../layout/hybrid-engine.js';
import { groupings } from '../layout/transition-plan.js';
import type { Generated, GenerateOptions, GenerateRequest } from './engine.js';
import { NativeEngine } from './native-engine.js';
import type { RankOfWorld, WeightsIn } from './rank-options.js';
import { generateOver, Replica } from './replica.js';
import { together } from './together.js';
import { Transition, type TransitionReport, type TransitionSetup, worldOf } from './transition.js';

export class HybridEngine {
  /** Of the last way there. */
  lastTransition: TransitionReport | undefined;
  onTransition: ((report: TransitionReport) => void) | undefined;
  private last: Promise<unknown> = Promise.resolve();

  private constructor(
    readonly transition: Transition,
    readonly replicas: readonly Replica[],
    private readonly engines: readonly NativeEngine[],
  ) {}

  /** @throws PARALLEL_INVALID, PARTS_INVALID, RANKS_INVALID, MEMORY_BUDGET */
  static async create(setup: TransitionSetup): Promise<HybridEngine> {
    const transition = new Transition(setup);
    const replicas: Replica[] = [];
    const engines: NativeEngine[] = [];
    const hybrid = new HybridEngine(transition, replicas, engines);
    try {
      for (const ranks of replicaRanks(setup)) {
        const begin = engines.length;
        for (const engine of openRanks(setup, transition, ranks)) engines.push(engine);
        const { pipeline, tensor } = setup.generation;
        replicas.push(new Replica(engines.slice(begin), (pipeline - 1) * tensor));
      }
      await together(replicas.flatMap(({ ranks }) => (ranks.length === 1 ? [] : ranks.map((engine) => engine.join()))));
      return hybrid;
    } catch (error) {
      await hybrid.close();
      throw error;
    }
  }

  /** Where the training model of a rank has its weights. */
  trainingWeights(rank: number): WeightsIn {
    return this.transition.trainingWeights(rank);
  }

  /** To the generation layout. What is in it already stays. */
  enter(): Promise<void> {
    return this.inTurn(() => this.go());
  }

  /** Back to the training layout. */
  leave(): Promise<void> {
    return this.inTurn(() => this.transition.leave());
  }

  /** Goes there and back by itself, unless the model is in its generation layout. */
  generate(requests: readonly GenerateRequest[], options: GenerateOptions): Promise<Generated[]> {
    return this.inTurn(async () => {
      options.signal?.throwIfAborted();
      if (requests.length === 0) return [];
      const stays = this.transition.entered;
      await this.go();
      try {
        const texts = await generateOver(this.replicas, requests, options);
        if (!stays) await this.transition.leave();
        return texts;
      } catch (error) {
        if (!stays) await this.transition.leave().catch(() => undefined);
        throw error;
      }
    });
  }

  private async go(): Promise<void> {
    if (this.transition.entered) return;
    this.lastTransition = await this.transition.enter();
    this.onTransition?.(this.lastTransition);
  }

  /** One call after the other: the ways there and back are not to be mixed. */
  private inTurn<T>(call: () => Promise<T>): Promise<T> {
    const result = this.last.then(call);
    this.last = result.catch(() => undefined);
    return result;
  }

  async close(): Promise<void> {
    for (const engine of this.engines) await engine.close();
    this.transition.close();
  }
}

/** Training ranks of each generation replica, in the order of their places in it. */
function replicaRanks({ train, generation, engine }: TransitionSetup): number[][] {
  const { replicaOfRank } = generationGroups(train, generation, groupings[engine]);
  const replicas: number[][] = Array.from({ length: Math.max(...replicaOfRank) + 1 }, () => []);
  for (const [rank, replica] of replicaOfRank.entries()) {
    const { pipeline, tensor } = placeInGeneration(rank, train, generation, groupings[engine]);
    replicas[replica]![pipeline * generation.tensor + tensor] = rank;
  }
  return replicas;
}

/** The engines of a replica, one by one: when a later one cannot be, those before it are in the caller's hands. */
function* openRanks(
  setup: TransitionSetup,
  transition: Transition,
  ranks: readonly number[],
): Generator<NativeEngine, void> {
  const { shape, parts, dtype, devices, timeoutSeconds = 300 } = setup;
  const world = worldOf(ranks.length, timeoutSeconds);
  for (const [place, rank] of ranks.entries()) {
    const { degrees, stages } = transition.views[rank]!;
    const member: { rank?: RankOfWorld } = world ? { rank: { degrees, rank: place, world, stages } } : {};
    yield new NativeEngine({
      ...{ shape, parts, dtype, device: devices[rank]!, weights: transition.generationWeights(rank) },
      ...member,
    });
  }
}
