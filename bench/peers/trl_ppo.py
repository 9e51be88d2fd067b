"""PPO iterations of TRL on the work of bench/iteration.ts: 32 sequences of 64 + 128 tokens. Prints one JSON line."""
import tempfile

from trl_peer import PROMPT, QUIET, RESPONSE, SHAPE, Clock, options_of, tokenizer_of

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer

SEQUENCES = 32

options = options_of(__doc__)
config = LlamaConfig.from_pretrained(SHAPE, pad_token_id=0)
rows = SEQUENCES * (options.iterations + 1)
prompts = Dataset.from_dict({"input_ids": torch.randint(4, config.vocab_size, (rows, PROMPT)).tolist()})
scored = LlamaConfig.from_pretrained(SHAPE, pad_token_id=0, num_labels=1)
clock = Clock()
trainer = PPOTrainer(
    args=PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=SEQUENCES,
        local_rollout_forward_batch_size=SEQUENCES,
        num_ppo_epochs=1,
        num_mini_batches=1,
        response_length=RESPONSE,
        total_episodes=rows,
        num_sample_generations=0,
        bf16=options.bfloat16,
        **QUIET,
    ),
    processing_class=tokenizer_of(config.vocab_size),
    model=LlamaForCausalLM(config),
    ref_model=LlamaForCausalLM(config),
    reward_model=LlamaForSequenceClassification(scored),
    value_model=LlamaForSequenceClassification(scored),
    train_dataset=prompts,
    eval_dataset=prompts.select(range(2)),
    callbacks=[clock],
)
trainer.train()
clock.report(options)
