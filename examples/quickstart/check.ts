/**
 * The quickstart's check as a reward function: the points, of six, that an answer of the lunch counter gets. It needs no reward
 * model: `lockstep train examples/quickstart/ppo.yaml --set 'reward={function: examples/quickstart/check.ts}'`.
 */
interface Sample {
  prompt: string;
  response: string;
}

const order = /(\w+) with (\w+) and (\w+)/;

export function reward(samples: readonly Sample[]): number[] {
  return samples.map(({ prompt, response }) => points(prompt, response));
}

function points(prompt: string, response: string): number {
  const asked = order.exec(prompt);
  const servings = [...response.matchAll(new RegExp(order, 'g'))];
  const [served] = servings;
  const servedOnce = servings.length === 1;
  let total = 0;
  // Opens with a greeting.
  if (/^ (Good day|Welcome)!/.test(response)) total += 1;
  // Serves what was asked for: the dish, the first and the second ingredient.
  for (const word of [1, 2, 3]) if (servedOnce && served?.[word] === asked?.[word]) total += 1;
  // Serves without a rude remark.
  if (servedOnce && !/ (Eat fast|Pay first)\./.test(response)) total += 1;
  // Closes with a wish.
  if (response.endsWith(' Enjoy your meal!')) total += 1;
  return total;
}
