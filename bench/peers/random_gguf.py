"""Writes a Llama of the shape of bench/decode.ts with random float16 weights for llama.cpp: random_gguf.py OUT.gguf"""
import json
import sys
from pathlib import Path

import gguf
import numpy as np

shape = json.loads((Path(__file__).parents[2] / "test/fixtures/configs/llama-25m/config.json").read_text())
width, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
heads, layers = shape["num_attention_heads"], shape["num_hidden_layers"]
random = np.random.default_rng(0)
writer = gguf.GGUFWriter(sys.argv[1], "llama")
writer.add_context_length(shape["max_position_embeddings"])
writer.add_embedding_length(width)
writer.add_block_count(layers)
writer.add_feed_forward_length(inner)
writer.add_head_count(heads)
writer.add_head_count_kv(shape["num_key_value_heads"])
writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
writer.add_rope_dimension_count(width // heads)
writer.add_rope_freq_base(shape["rope_theta"])
writer.add_vocab_size(vocabulary)
writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
# A vocabulary that llama.cpp accepts: three special tokens, the bytes, and words.
writer.add_tokenizer_model("llama")
writer.add_token_list(["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + [f"w{i}" for i in range(vocabulary - 259)])
writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(vocabulary - 259)])
writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (vocabulary - 259))
writer.add_bos_token_id(1)
writer.add_eos_token_id(2)


def matrix(name, rows, columns):
    writer.add_tensor(name, (random.standard_normal((rows, columns)) * 0.02).astype(np.float16))


def gain(name):
    writer.add_tensor(name, np.ones(width, np.float32))


matrix("token_embd.weight", vocabulary, width)
for layer in range(layers):
    gain(f"blk.{layer}.attn_norm.weight")
    for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
        matrix(f"blk.{layer}.{part}.weight", width, width)
    gain(f"blk.{layer}.ffn_norm.weight")
    matrix(f"blk.{layer}.ffn_gate.weight", inner, width)
    matrix(f"blk.{layer}.ffn_up.weight", inner, width)
    matrix(f"blk.{layer}.ffn_down.weight", width, inner)
gain("output_norm.weight")
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
