"""Architectures of transformers at toy size, by name: how each is built, and what it is fed.

`DECODERS` are those with plain attention, full or over a window; `architectures_special` and
`architectures_across` hold the others. All have 128 tokens, and a window of 8 where they have one;
weights are random (`tiny_models`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

VOCAB = 128
PAD, EOS = 0, 2
WINDOW = 8

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model class of transformers and a configuration that makes it small.

    `gain` is how wide weights are spread: chosen so that text varies. Weights whose name ends in
    `quiet` have a quarter of it: where a model does not scale its scores, the scale is in those.
    `parts` are configurations inside the configuration, by argument: class and arguments. `adapt`
    turns a batch of random prompts into what the model is fed.
    """

    model: str
    config: str
    arguments: dict[str, Any]
    gain: float = 1.5
    quiet: str | None = None
    parts: dict[str, tuple[str, dict[str, Any]]] | None = None
    adapt: Callable[[Inputs], Inputs] | None = None


TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
# What most configurations call it, and what those that descend from GPT-2 do.
PLAIN: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LLAMA_LIKE: dict[str, Any] = {**PLAIN, "num_key_value_heads": 2, "head_dim": 16}
GPT_LIKE: dict[str, Any] = {
    **TOKENS,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 1536,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
SLIDING: dict[str, Any] = {"sliding_window": WINDOW}
FULL_AND_SLIDING = ["sliding_attention", "full_attention"]


def _llama_like(name: str, *, gain: float = 1.5, **arguments: Any) -> Architecture:
    return Architecture(f"{name}ForCausalLM", f"{name}Config", {**LLAMA_LIKE, **arguments}, gain)


def _plain(name: str, *, gain: float = 1.5, **arguments: Any) -> Architecture:
    return Architecture(f"{name}ForCausalLM", f"{name}Config", {**PLAIN, **arguments}, gain)


DECODERS: dict[str, Architecture] = {
    "llama": _llama_like("Llama"),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3"),
    "mistral": _llama_like("Mistral", **SLIDING),
    "mistral_full": _llama_like("Mistral", sliding_window=None),
    "mixtral": _llama_like("Mixtral", **EXPERTS),
    "gemma": _llama_like("Gemma"),
    "gemma2": _llama_like("Gemma2", **SLIDING, query_pre_attn_scalar=16),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **LLAMA_LIKE,
            **SLIDING,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt_oss": _llama_like("GptOss", **EXPERTS, **SLIDING, layer_types=FULL_AND_SLIDING),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT_LIKE, gain=2.5),
    "gpt_neo": Architecture(
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            **TOKENS,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
    ),
    "gpt_neox": _plain("GPTNeoX"),
    "gptj": Architecture("GPTJForCausalLM", "GPTJConfig", {**GPT_LIKE, "rotary_dim": 8}),
    "codegen": Architecture("CodeGenForCausalLM", "CodeGenConfig", {**GPT_LIKE, "rotary_dim": 8}),
    "bloom": Architecture(
        "BloomForCausalLM",
        "BloomConfig",
        {**TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False},
        gain=2.5,
    ),
    "mpt": Architecture(
        "MptForCausalLM",
        "MptConfig",
        {
            **TOKENS,
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "tie_word_embeddings": False,
            "use_cache": True,
        },
        gain=2.0,
    ),
    "falcon": Architecture(
        "FalconForCausalLM",
        "FalconConfig",
        {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        gain=2.5,
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {
            **TOKENS,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 1536,
            "word_embed_proj_dim": 64,
        },
        gain=3.0,
    ),
    "phi": _plain("Phi", gain=2.5, partial_rotary_factor=0.5),
    "phi3": _plain("Phi3", num_key_value_heads=2),
    "stablelm": _plain("StableLm", num_key_value_heads=2),
    "starcoder2": _plain("Starcoder2", num_key_value_heads=2),
    "olmo": _plain("Olmo", num_key_value_heads=2),
    "olmo2": _plain("Olmo2", num_key_value_heads=2),
    "olmo3": _plain("Olmo3", num_key_value_heads=2, layer_types=FULL_AND_SLIDING, **SLIDING),
    "cohere": _plain("Cohere", num_key_value_heads=2, logit_scale=1.0),
    "cohere2": _llama_like("Cohere2", logit_scale=1.0, layer_types=FULL_AND_SLIDING, **SLIDING),
    "granite": _plain("Granite", num_key_value_heads=2),
    "granitemoe": _plain("GraniteMoe", num_key_value_heads=2, **EXPERTS),
    "glm": _llama_like("Glm"),
    "glm4": _llama_like("Glm4"),
    "nemotron": _llama_like("Nemotron"),
    "persimmon": _plain("Persimmon"),
    "diffllama": _llama_like("DiffLlama"),
    "smollm3": _llama_like("SmolLM3", no_rope_layers=[1, 0]),
    "exaone4": _llama_like("Exaone4", layer_types=FULL_AND_SLIDING, **SLIDING),
    "ernie4_5": _llama_like("Ernie4_5"),
    "helium": _llama_like("Helium"),
    "arcee": _llama_like("Arcee"),
    "seed_oss": _llama_like("SeedOss"),
    "apertus": _llama_like("Apertus"),
    "qwen2_moe": _llama_like("Qwen2Moe", **QWEN_EXPERTS),
    "qwen3_moe": _llama_like("Qwen3Moe", gain=2.0, **QWEN_EXPERTS),
    "glm4_moe": _llama_like(
        "Glm4Moe",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "dbrx": Architecture(
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            **TOKENS,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {
                "hidden_size": 64,
                "ffn_hidden_size": 32,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            },
        },
    ),
    "jetmoe": _plain("JetMoe", num_key_value_heads=2, kv_channels=16, **EXPERTS),
}
