"""GRPO iterations of TRL on the work of bench/grpo.ts: 8 prompts x 4 answers, 64 + 128 tokens. Prints one JSON line."""
import tempfile

from trl_peer import PROMPT, QUIET, RESPONSE, SHAPE, Clock, options_of, tokenizer_of

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

PROMPTS, SAMPLES = 8, 4

options = options_of(__doc__)
config = LlamaConfig.from_pretrained(SHAPE, pad_token_id=0, bos_token_id=1, eos_token_id=2)
rows = torch.randint(4, config.vocab_size, (64, PROMPT)).tolist()
prompts = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in rows]})
folder = tempfile.mkdtemp()
processing = tokenizer_of(config.vocab_size)
model = LlamaForCausalLM(config)
model.generation_config.eos_token_id = None
model.save_pretrained(f"{folder}/model")
processing.save_pretrained(f"{folder}/model")
clock = Clock()
trainer = GRPOTrainer(
    model=f"{folder}/model",
    args=GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=RESPONSE,
        generation_kwargs={"min_new_tokens": RESPONSE},
        max_steps=options.iterations + 1,
        beta=0.04,
        bf16=options.bfloat16,
        **QUIET,
    ),
    processing_class=processing,
    reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
    train_dataset=prompts,
    callbacks=[clock],
)
trainer.train()
clock.report(options)
