"""GRPO iterations of TRL on the work of bench/grpo.ts: 8 prompts x 4 answers, 64 + 128 tokens. Prints one JSON line."""
import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

SHAPE = Path(__file__).parents[2] / "test/fixtures/configs/llama-25m"
PROMPTS, SAMPLES, PROMPT, RESPONSE = 8, 4, 64, 128

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--bfloat16", action="store_true")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--iterations", type=int, default=3)
options = parser.parse_args()
torch.set_num_threads(options.threads)
torch.manual_seed(0)
config = LlamaConfig.from_pretrained(SHAPE, pad_token_id=0, bos_token_id=1, eos_token_id=2)
words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, config.vocab_size)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
processing = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
)
rows = torch.randint(4, config.vocab_size, (64, PROMPT)).tolist()
prompts = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in rows]})
folder = tempfile.mkdtemp()
model = LlamaForCausalLM(config)
model.generation_config.eos_token_id = None
model.save_pretrained(f"{folder}/model")
processing.save_pretrained(f"{folder}/model")
seconds = []


class Clock(TrainerCallback):
    """Times whole steps: sampling, scoring and the update; the first, which compiles and allocates, is not counted."""

    def on_step_begin(self, *_, **__):
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__):
        seconds.append(time.perf_counter() - self.start)


settings = GRPOConfig(
    output_dir=folder,
    per_device_train_batch_size=PROMPTS * SAMPLES,
    num_generations=SAMPLES,
    max_completion_length=RESPONSE,
    generation_kwargs={"min_new_tokens": RESPONSE},
    max_steps=options.iterations + 1,
    beta=0.04,
    gradient_checkpointing=False,
    use_cpu=True,
    bf16=options.bfloat16,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
)
trainer = GRPOTrainer(
    model=f"{folder}/model",
    args=settings,
    processing_class=processing,
    reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
    train_dataset=prompts,
    callbacks=[Clock()],
)
trainer.train()
taken = statistics.median(seconds[1:])
print(json.dumps({"peer": "TRL " + trl.__version__, "bfloat16": options.bfloat16, "secondsPerIteration": taken}))
