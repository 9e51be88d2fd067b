"""torch and transformers on the work of bench/training.ts and bench/decode.ts. Prints one JSON line."""
import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

SHAPE = Path(__file__).parents[2] / "test/fixtures/configs/llama-25m"
GPU_SHAPE = Path(__file__).parents[1] / "shapes/llama-1b"
PROMPT = 128


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
    return {"length": length, "tokensPerSecond": tokens.numel() / statistics.median(times)}


@torch.inference_mode()
def decoding(model, forward, runs, sequences, steps, compiled):
    """Tokens per second of prefill and of greedy decoding with a cache, which all runs use: graphs keep its addresses."""
    device = model.device
    prompt = torch.randint(3, model.config.vocab_size, (sequences, PROMPT), device=device)
    positions = torch.arange(PROMPT + steps, device=device)
    length = PROMPT + steps + 1
    static = StaticCache(config=model.config, max_cache_len=length) if compiled else None

    def prefilled(cache):
        out = model(input_ids=prompt, past_key_values=cache, cache_position=positions[:PROMPT], logits_to_keep=1)
        return out.logits.argmax(-1)

    def decoded(token, cache):
        for i in range(PROMPT, PROMPT + steps):
            token = forward(input_ids=token, past_key_values=cache, cache_position=positions[i : i + 1]).logits.argmax(-1)

    decode, prefill = [], []
    for run in range(runs + 1):
        cache = static or DynamicCache()
        if static:
            static.reset()
        first, token = seconds(lambda: prefilled(cache))
        rest, _ = seconds(lambda: decoded(token, cache))
        if run > 0:
            prefill.append(sequences * PROMPT / first)
            decode.append(sequences * steps / rest)
    return {
        "promptTokens": PROMPT,
        "newTokens": steps,
        "decodeTokensPerSecond": statistics.median(decode),
        "prefillTokensPerSecond": statistics.median(prefill),
    }


def machine(device):
    """The GPU where one computes, else the CPU, as `lockstep bench` names them."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


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
    gpu, train = options.device == "cuda", options.work == "training"
    shape = LlamaConfig.from_pretrained(GPU_SHAPE if gpu else SHAPE)
    # A training step has float32 parameters, gradients and moments, and computes in bfloat16 by autocast: as ours.
    dtype = torch.bfloat16 if options.bfloat16 and not train else torch.float32
    model = LlamaForCausalLM._from_config(shape, attn_implementation="sdpa", dtype=dtype).to(options.device)
    sequences = options.sequences or (8 if train else 32)
    # One decode step is many short kernels: on a GPU CUDA graphs start them.
    mode = "reduce-overhead" if gpu and not train else "default"
    forward = torch.compile(model, dynamic=False, mode=mode) if options.compile else model
    result = (
        training(model, forward, options.runs, options.bfloat16, sequences, options.length)
        if train
        else decoding(model.eval(), forward, options.runs, sequences, 128 if gpu else 32, options.compile)
    )
    what = {"compiled": options.compile, "bfloat16": options.bfloat16, "work": options.work, "sequences": sequences}
    print(json.dumps({"peer": "torch " + torch.__version__, **what, **result, "machine": machine(options.device)}))


main()
