"""What the TRL peers share: the shape, a tokenizer of one word a token, and a clock of whole iterations."""
import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

SHAPE = Path(__file__).parents[2] / "test/fixtures/configs/llama-25m"
PROMPT, RESPONSE = 64, 128
# What only takes time without these.
QUIET = {"gradient_checkpointing": False, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}


def options_of(description):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=3, help="after one that is not counted")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    return options


def tokenizer_of(vocabulary):
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


class Clock(TrainerCallback):
    """From the end of one iteration to the end of the next: sampling, scoring and the update."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *_, **__):
        self.ends.append(time.perf_counter())

    def report(self, options):
        taken = statistics.median(b - a for a, b in zip(self.ends, self.ends[1:]))
        print(json.dumps({"peer": "TRL " + trl.__version__, "bfloat16": options.bfloat16, "secondsPerIteration": taken}))
