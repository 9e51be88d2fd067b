"""PPO iterations of TRL on the work of bench/iteration.ts: 32 sequences of 64 + 128 tokens. Prints one JSON line."""
import argparse
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", TOKENIZERS_PARALLELISM="false")
import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer

SHAPE = Path(__file__).parents[2] / "test/fixtures/configs/llama-25m"
SEQUENCES, PROMPT, RESPONSE = 32, 64, 128

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--bfloat16", action="store_true")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--iterations", type=int, default=2)
options = parser.parse_args()
torch.set_num_threads(options.threads)
torch.manual_seed(0)
config = LlamaConfig.from_pretrained(SHAPE, pad_token_id=0)
words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, config.vocab_size)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
processing = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
)
rows = SEQUENCES * options.iterations
prompts = Dataset.from_dict({"input_ids": torch.randint(4, config.vocab_size, (rows, PROMPT)).tolist()})
scored = LlamaConfig.from_pretrained(SHAPE, pad_token_id=0, num_labels=1)
settings = PPOConfig(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=SEQUENCES,
    local_rollout_forward_batch_size=SEQUENCES,
    num_ppo_epochs=1,
    num_mini_batches=1,
    response_length=RESPONSE,
    total_episodes=rows,
    num_sample_generations=0,
    gradient_checkpointing=False,
    use_cpu=True,
    bf16=options.bfloat16,
    report_to=[],
    save_strategy="no",
    disable_tqdm=True,
)
trainer = PPOTrainer(
    args=settings,
    processing_class=processing,
    model=LlamaForCausalLM(config),
    ref_model=LlamaForCausalLM(config),
    reward_model=LlamaForSequenceClassification(scored),
    value_model=LlamaForSequenceClassification(scored),
    train_dataset=prompts,
    eval_dataset=prompts.select(range(2)),
)
start = time.perf_counter()
trainer.train()
taken = (time.perf_counter() - start) / options.iterations
print(json.dumps({"peer": "TRL " + trl.__version__, "bfloat16": options.bfloat16, "secondsPerIteration": taken}))
