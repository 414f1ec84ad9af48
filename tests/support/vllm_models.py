"""Small models with random weights for vLLM, and adapters.

A llama, a gemma 3 with sliding windows, a deepseek with latent attention, and a mamba.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

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
    """Write a model below `folder`, unless it is there. Returns its directory."""
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        _MODELS[name]().save_pretrained(path)
    return path


def save_adapter(folder: Path, seed: int) -> Path:
    """Write a LoRA adapter of the llama with random weights. Returns its directory."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, weights, rank = torch.Generator().manual_seed(seed), {}, 8
    for layer in range(4):
        for name, width in (("q_proj", 256), ("k_proj", 128), ("v_proj", 128)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            for part, shape in (("lora_A", (rank, 256)), ("lora_B", (width, rank))):
                weights[f"{place}.{part}.weight"] = 0.1 * torch.randn(shape, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


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


def _deepseek() -> DeepseekV2ForCausalLM:
    """Return a model with the only sizes of latents that vLLM's CPU kernel takes."""
    sizes = {**_SIZES, "num_key_value_heads": 4}
    del sizes["head_dim"]
    config = DeepseekV2Config(
        num_hidden_layers=3,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        first_k_dense_replace=3,  # no layer has experts
        **sizes,
    )
    return DeepseekV2ForCausalLM(config)


def _mamba() -> MambaForCausalLM:
    return MambaForCausalLM(MambaConfig(vocab_size=2048, hidden_size=64, num_hidden_layers=2))


_MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "gemma": _gemma,
    "deepseek": _deepseek,
    "mamba": _mamba,
}
