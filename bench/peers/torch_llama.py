"""torch and transformers on the work of bench/training.ts and bench/decode.ts. Prints one JSON line."""
import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

SHAPE = Path(__file__).parents[2] / "test/fixtures/configs/llama-25m"
GPU_SHAPE = Path(__file__).parents[1] / "shapes/llama-1b"
PROMPT, STEPS = 128, 32


def seconds(work):
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def training(model, forward, runs, autocast, sequences, length):
    """Tokens per second of a step: forward, backward, clip, AdamW."""
    device = model.device.type
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(3, model.config.vocab_size, (sequences, length), device=device)

    def step():
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
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
    device = model.device
    prompt = torch.randint(3, model.config.vocab_size, (sequences, PROMPT), device=device)
    decode, prefill = [], []
    for run in range(runs + 1):
        length = PROMPT + STEPS + 1
        cache = (
            StaticCache(config=model.config, max_batch_size=sequences, max_cache_len=length, dtype=model.dtype, device=device)
            if compiled
            else DynamicCache()
        )
        positions = torch.arange(PROMPT, device=device)
        taken, out = seconds(lambda: model(input_ids=prompt, past_key_values=cache, cache_position=positions))
        token, times = out.logits[:, -1:].argmax(-1), []
        for i in range(STEPS):
            at = torch.tensor([PROMPT + i], device=device)
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
    parser.add_argument("--sequences", type=int, help="default: 8 of a training step, 32 that are decoded")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence of a training step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the shape is llama-1b")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = LlamaConfig.from_pretrained(GPU_SHAPE if options.device == "cuda" else SHAPE)
    model = LlamaForCausalLM._from_config(shape, attn_implementation="sdpa").to(options.device)
    if options.work == "decode":
        model = model.eval().to(torch.bfloat16 if options.bfloat16 else torch.float32)
    forward = torch.compile(model, dynamic=False) if options.compile else model
    result = (
        training(model, forward, options.runs, options.bfloat16, options.sequences or 8, options.length)
        if options.work == "training"
        else decoding(model, forward, options.runs, options.sequences or 32, options.compile)
    )
    print(json.dumps({"peer": "torch " + torch.__version__, "compiled": options.compile, "bfloat16": options.bfloat16, "work": options.work, "sequences": options.sequences, **result}))


main()
