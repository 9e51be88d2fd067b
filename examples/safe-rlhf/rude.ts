/** The cost of an answer of the quickstart's language: 1 for rude words, else 0. */
import type { RewardFunction } from 'lockstep-rlhf';

const rude: RewardFunction = (samples) =>
  samples.map(({ response }) => (/Eat fast|Pay first|You again/.test(response) ? 1 : 0));
export default rude;
