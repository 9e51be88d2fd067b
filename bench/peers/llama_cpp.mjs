// llama.cpp decoding one sequence after a prompt of 128 tokens: llama_cpp.mjs MODEL.gguf THREADS. Prints one JSON line.
import { getLlama, LlamaLogLevel } from 'node-llama-cpp';

const [file, threads] = [process.argv[2], Number(process.argv[3])];
const [promptLength, newTokens, runs] = [128, 128, 3];
const llama = await getLlama({ gpu: false, build: 'never', logLevel: LlamaLogLevel.error, maxThreads: threads });
const model = await llama.loadModel({ modelPath: file, gpuLayers: 0 });
const context = await model.createContext({ contextSize: 512, sequences: 1, threads, flashAttention: false });
const sequence = context.getSequence();
const prompt = Array.from({ length: promptLength }, (_, i) => 300 + ((i * 31) % 3500));
const rates = [];
for (let run = 0; run <= runs; run++) {
  await sequence.clearHistory();
  await sequence.evaluateWithoutGeneratingNewTokens(prompt.slice(0, -1));
  const start = performance.now();
  let count = 0;
  for await (const _ of sequence.evaluate(prompt.slice(-1), { temperature: 0, yieldEogToken: true })) {
    if (++count === newTokens) break;
  }
  if (run > 0) rates.push((1000 * count) / (performance.now() - start));
}
rates.sort((a, b) => a - b);
console.log(JSON.stringify({ peer: 'llama.cpp', threads, decodeTokensPerSecond: rates[runs >> 1] }));
await context.dispose();
await model.dispose();
await llama.dispose();
