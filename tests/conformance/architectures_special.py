"""Architectures with more than plain attention: latent, chunked, shared, recurrent."""

from __future__ import annotations

from typing import Any

from tests.conformance.architectures import (
    LLAMA_LIKE,
    PLAIN,
    QWEN_EXPERTS,
    SLIDING,
    TOKENS,
    VOCAB,
    WINDOW,
    Architecture,
)

# ---------------------------------------------------------------- latent attention, chunks, sharing

_LATENT: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "max_position_embeddings": 2048,
}
OTHER_DECODERS: dict[str, Architecture] = {
    "deepseek_v2": Architecture("DeepseekV2ForCausalLM", "DeepseekV2Config", _LATENT),
    "deepseek_v3": Architecture("DeepseekV3ForCausalLM", "DeepseekV3Config", _LATENT),
    "glm4_moe_lite": Architecture(
        "Glm4MoeLiteForCausalLM",
        "Glm4MoeLiteConfig",
        {name: value for name, value in _LATENT.items() if name != "first_k_dense_replace"},
    ),
    "deepseek_v32": Architecture(
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        {**_LATENT, "index_topk": WINDOW, "index_head_dim": 16, "index_n_heads": 2},
    ),
    "llama4": Architecture(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **LLAMA_LIKE,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "attention_chunk_size": WINDOW,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    "gemma3n": Architecture(
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        {
            **LLAMA_LIKE,
            **SLIDING,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        },
    ),
}

# ---------------------------------------------------------------- recurrent, wholly or in part

_MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
_MAMBA2: dict[str, Any] = {
    **_MAMBA,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
RECURRENT: dict[str, Architecture] = {
    "qwen3_next": Architecture(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **LLAMA_LIKE,
            **QWEN_EXPERTS,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "olmo_hybrid": Architecture(
        "OlmoHybridForCausalLM",
        "OlmoHybridConfig",
        {
            **PLAIN,
            "num_key_value_heads": 4,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "kimi_linear": Architecture(
        "KimiLinearForCausalLM",
        "KimiLinearConfig",
        {
            **{n: value for n, value in _LATENT.items() if n != "first_k_dense_replace"},
            "q_lora_rank": None,
            "num_local_experts": 4,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "minimax": Architecture(
        "MiniMaxForCausalLM",
        "MiniMaxConfig",
        {
            **LLAMA_LIKE,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "block_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "jamba": Architecture(
        "JambaForCausalLM",
        "JambaConfig",
        {
            **PLAIN,
            **_MAMBA,
            "num_key_value_heads": 2,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": Architecture(
        "BambaForCausalLM",
        "BambaConfig",
        {**PLAIN, **_MAMBA2, "num_key_value_heads": 2, "attn_layer_indices": [1]},
    ),
    "falcon_h1": Architecture(
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {**PLAIN, **_MAMBA2, "num_key_value_heads": 2, "mamba_d_ssm": 128},
    ),
    "zamba2": Architecture(
        "Zamba2ForCausalLM",
        "Zamba2Config",
        {
            **{name: value for name, value in PLAIN.items() if name != "tie_word_embeddings"},
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid"],
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "chunk_size": 16,
            "adapter_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": Architecture(
        "Lfm2ForCausalLM",
        "Lfm2Config",
        {**PLAIN, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    ),
    "granitemoehybrid": Architecture(
        "GraniteMoeHybridForCausalLM",
        "GraniteMoeHybridConfig",
        {
            **PLAIN,
            **_MAMBA2,
            "num_key_value_heads": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
        },
    ),
    "nemotron_h": Architecture(
        "NemotronHForCausalLM",
        "NemotronHConfig",
        {
            **{name: value for name, value in LLAMA_LIKE.items() if name != "num_hidden_layers"},
            "layers_block_type": ["mamba", "attention", "mlp"],
            "ssm_state_size": 8,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
            "use_mamba_kernels": False,
        },
    ),
    "recurrent_gemma": Architecture(
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            **PLAIN,
            "num_key_value_heads": 2,
            "lru_width": 64,
            "attention_window_size": WINDOW,
            "block_types": ["recurrent", "attention"],
        },
        gain=2.0,
    ),
    "mamba": Architecture(
        "MambaForCausalLM",
        "MambaConfig",
        {**TOKENS, "hidden_size": 64, "state_size": 8, "num_hidden_layers": 2},
    ),
    "mamba2": Architecture(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            **TOKENS,
            "hidden_size": 64,
            "state_size": 8,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "rwkv": Architecture(
        "RwkvForCausalLM",
        "RwkvConfig",
        {**TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64},
    ),
}
