"""torch and transformers on the work of bench/training.ts and bench/decode.ts. Prints one JSON line."""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

SHAPE = Path(__file__).parents[2] / "test/fixtures/configs/llama-25m"
PROMPT, STEPS = 128, 32


def seconds(work):
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def training(model, forward, runs, autocast):
    """Tokens per second of a step on 8 x 256 tokens: forward, backward, clip, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(3, model.config.vocab_size, (8, 256))

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = [seconds(step)[0] for _ in range(runs + 2)][2:]
    return {"tokensPerSecond": tokens.numel() / statistics.median(times)}


@torch.inference_mode()
def decoding(model, forward, runs, sequences, compiled):
    """Tokens per second of prefill and of greedy decoding with a cache."""
    prompt = torch.randint(3, model.config.vocab_size, (sequences, PROMPT))
    decode, prefill = [], []
    for run in range(runs + 1):
        length = PROMPT + STEPS + 1
        cache = (
            StaticCache(config=model.config, max_batch_size=sequences, max_cache_len=length, dtype=model.dtype, device="cpu")
            if compiled
            else DynamicCache()
        )
        positions = torch.arange(PROMPT)
        taken, out = seconds(lambda: model(input_ids=prompt, past_key_values=cache, cache_position=positions))
        token, times = out.logits[:, -1:].argmax(-1), []
        for i in range(STEPS):
            at = torch.tensor([PROMPT + i])
            one, out = seconds(lambda: forward(input_ids=token, past_key_values=cache, cache_position=at))
            token = out.logits[:, -1:].argmax(-1)
            times.append(one)
        if run > 0:
            prefill.append(sequences * PROMPT / taken)
            decode.append(sequences / statistics.median(times))
    return {"decodeTokensPerSecond": statistics.median(decode), "prefillTokensPerSecond": statistics.median(prefill)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["training", "decode"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig.from_pretrained(SHAPE), attn_implementation="sdpa")
    if options.work == "decode":
        model = model.eval().to(torch.bfloat16 if options.bfloat16 else torch.float32)
    forward = torch.compile(model, dynamic=False) if options.compile else model
    result = (
        training(model, forward, options.runs, options.bfloat16)
        if options.work == "training"
        else decoding(model, forward, options.runs, options.sequences, options.compile)
    )
    print(json.dumps({"peer": "torch " + torch.__version__, "compiled": options.compile, "bfloat16": options.bfloat16, **result}))


main()
