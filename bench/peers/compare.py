"""Ours and a peer in turn: compare.py training|decode|iteration|grpo. Prints a JSON line per round and the medians of the ratios."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}


def lines_of(*command):
    """JSON lines that a command prints."""
    result = subprocess.run([str(word) for word in command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    found = [json.loads(line) for line in result.stdout.splitlines() if line.startswith('{"')]
    if result.returncode != 0 or not found:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{result.stderr[-2000:]}")
    return found


def ours(bench, runs=3):
    measurements = lines_of("node", ROOT / "dist/cli/main.js", "bench", bench, "--runs", runs)
    return {each["name"]: each["value"] for each in measurements}


def torch(options, *words):
    """Of each measurement the better of eager and compiled, and of the dtypes."""
    dtypes = [[], ["--bfloat16"]] if options.bfloat16 else [[]]
    runs = [
        lines_of(sys.executable, HERE / "torch_llama.py", *words, *dtype, *compiled)[-1]
        for dtype in dtypes
        for compiled in ([], ["--compile"])
    ]
    names = [name for name in runs[0] if name.endswith("PerSecond")]
    return {name: max(run[name] for run in runs) for name in names}


def training(options):
    us, peer = ours("training"), torch(options, "training")["tokensPerSecond"]
    return {dtype: us[f"training step 8 x 256, {dtype}"] / peer for dtype in ("float32", "bfloat16")}, {**us, "torch": peer}


def decode(options):
    us, many = ours("decode"), torch(options, "decode", "--sequences", 32)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        subprocess.run([sys.executable, HERE / "random_gguf.py", file], check=True, capture_output=True)
        single = max(lines_of("node", HERE / "llama_cpp.mjs", file, threads)[-1]["decodeTokensPerSecond"] for threads in (1, 2))
    best = lambda what, sequences: max(rate for name, rate in us.items() if name.startswith(f"{what} B={sequences},"))
    ratios = {
        "decode, 1 sequence, to llama.cpp": best("decode", 1) / single,
        "decode, 32 sequences, to torch": best("decode", 32) / many["decodeTokensPerSecond"],
        "prefill, 32 sequences, to torch": best("prefill", 32) / many["prefillTokensPerSecond"],
    }
    return ratios, {**us, "llama.cpp": single, "torch": many}


def iteration(options, bench="iteration", algorithm="PPO"):
    us = ours(bench)
    runs = [[], ["--bfloat16"]] if options.bfloat16 else [[]]
    script = HERE / f"trl_{algorithm.lower()}.py"
    peer = min((lines_of(sys.executable, script, *flags)[-1] for flags in runs), key=lambda line: line["secondsPerIteration"])
    ratio = peer["secondsPerIteration"] / us[f"{algorithm} iteration"]
    return {f"{algorithm} iteration": ratio}, {**us, "TRL": peer}


def grpo(options):
    return iteration(options, "grpo", "GRPO")


def main():
    works = {"training": training, "decode": decode, "iteration": iteration, "grpo": grpo}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=works)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bfloat16", action="store_true", help="let the peer try bfloat16 too")
    options = parser.parse_args()
    rounds = []
    for _ in range(options.rounds):
        ratios, rates = works[options.work](options)
        rounds.append(ratios)
        print(json.dumps({"ratios": {name: round(ratio, 3) for name, ratio in ratios.items()}, **rates}), flush=True)
    for name in rounds[0]:
        values = sorted(each[name] for each in rounds)
        print(f"{name}: {statistics.median(values):.2f} times the peer ({values[0]:.2f} to {values[-1]:.2f})")


main()
