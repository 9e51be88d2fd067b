/** Points of an answer to a row of orders.jsonl: a half for the wanted dish, a half for a polite end. */
import type { RewardFunction } from 'lockstep-rlhf';

const reward: RewardFunction = (samples) =>
  samples.map(({ response, row }) => {
    const served = response.includes(`${row.dish} with ${row.first} and ${row.second}`) ? 0.5 : 0;
    const wished = response.endsWith('Enjoy your meal!') ? 0.5 : 0;
    return served + wished;
  });
export default reward;
