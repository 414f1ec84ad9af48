"""Small models with random weights for vLLM: a llama, and a gemma 3 with sliding windows."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

_SIZES = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,  # smaller ones say one token for ever
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_model(name: str, folder: Path) -> Path:
    """Write "llama" or "gemma" below `folder`, unless it is there. Returns its directory."""
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        made = {"llama": _llama, "gemma": _gemma}[name]()
        made.save_pretrained(path)
    return path


def _llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **_SIZES))


def _gemma() -> Gemma3ForCausalLM:
    """Return a model in which three of four layers see 128 tokens."""
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    config = Gemma3TextConfig(
        num_hidden_layers=4,
        layer_types=kinds,
        sliding_window=128,
        query_pre_attn_scalar=64,
        **_SIZES,
    )
    return Gemma3ForCausalLM(config)
