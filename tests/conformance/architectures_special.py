"""Architectures with more than plain attention: latent, chunked, shared, recurrent, across."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.conformance.architectures import (
    EOS,
    LLAMA_LIKE,
    PAD,
    PLAIN,
    QWEN_EXPERTS,
    SLIDING,
    TOKENS,
    VOCAB,
    WINDOW,
    Architecture,
    Inputs,
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

# ---------------------------------------------------------------- encoder and decoder

_BART_LIKE: dict[str, Any] = {
    **TOKENS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "tie_word_embeddings": False,
}
_T5_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "tie_word_embeddings": False,
    "num_layers": 2,
    "num_heads": 4,
}
_T5GEMMA_MODULE: dict[str, Any] = {**LLAMA_LIKE, **SLIDING, "query_pre_attn_scalar": 16}


def _spoken(inputs: Inputs) -> Inputs:
    """Sounds as random as the prompts: 60 frames of 8 numbers for each row."""
    generator = torch.Generator().manual_seed(int(inputs["input_ids"].sum()))
    return {"input_features": torch.randn(len(inputs["input_ids"]), 8, 60, generator=generator)}


ENCODER_DECODERS: dict[str, Architecture] = {
    "t5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {**_T5_LIKE, "feed_forward_proj": "gated-gelu"},  # as since T5 1.1
        gain=1.5,
        quiet=".q.weight",
    ),
    "mt5": Architecture(
        "MT5ForConditionalGeneration", "MT5Config", _T5_LIKE, gain=2.0, quiet=".q.weight"
    ),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", _BART_LIKE, gain=0.7),
    "mbart": Architecture("MBartForConditionalGeneration", "MBartConfig", _BART_LIKE, gain=1.5),
    "pegasus": Architecture(
        "PegasusForConditionalGeneration", "PegasusConfig", _BART_LIKE, gain=2.0
    ),
    "marian": Architecture("MarianMTModel", "MarianConfig", _BART_LIKE, gain=0.7),
    "led": Architecture(
        "LEDForConditionalGeneration",
        "LEDConfig",
        {
            **{n: value for n, value in _BART_LIKE.items() if n != "max_position_embeddings"},
            "max_encoder_position_embeddings": 256,
            "max_decoder_position_embeddings": 256,
            "attention_window": 8,
        },
        gain=0.7,
    ),
    "t5gemma": Architecture(
        "T5GemmaForConditionalGeneration",
        "T5GemmaConfig",
        {"vocab_size": VOCAB, "tie_word_embeddings": False},
        parts={
            "encoder": ("T5GemmaModuleConfig", _T5GEMMA_MODULE),
            "decoder": ("T5GemmaModuleConfig", {**_T5GEMMA_MODULE, "is_decoder": True}),
        },
    ),
    "whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            **{n: value for n, value in _BART_LIKE.items() if n != "max_position_embeddings"},
            "num_mel_bins": 8,
            "max_source_positions": 30,
            "max_target_positions": 128,
            "begin_suppress_tokens": None,
        },
        gain=2.0,
        adapt=_spoken,
    ),
}

# ---------------------------------------------------------------- vision and language

_IMAGE, _VIDEO, _END, _START = range(VOCAB - 4, VOCAB)  # tokens that are no text
_PARTS = 4  # of an image of 28 x 28 or 56 x 56 pixels, a token each


def _read(inputs: Inputs) -> Inputs:
    """The prompts without tokens that stand for something seen."""
    return {**inputs, "input_ids": inputs["input_ids"].clamp(max=_IMAGE - 1)}


def _with_image_tokens(inputs: Inputs) -> Inputs:
    """Every row's text after an image."""
    rows = len(inputs["input_ids"])
    seen = torch.tensor([[_START, *[_IMAGE] * _PARTS, _END]]).repeat(rows, 1)
    text = _read(inputs)["input_ids"]
    ids = torch.cat([torch.full_like(seen, PAD), text], dim=1)
    mask = torch.cat([torch.zeros_like(seen), inputs["attention_mask"]], dim=1)
    for row, first in enumerate(mask.argmax(dim=1).tolist()):
        ids[row, first - seen.shape[1] : first] = seen[row]
        mask[row, first - seen.shape[1] : first] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _seen_by_clip(inputs: Inputs) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(inputs["input_ids"]), 3, 28, 28, generator=generator)
    return {**_with_image_tokens(inputs), "pixel_values": pixels}


def _seen_in_patches(inputs: Inputs) -> Inputs:
    """As Qwen takes them: 4 x 4 patches of 14 x 14 pixels in two frames, merged by fours."""
    generator = torch.Generator().manual_seed(0)
    rows, patches = len(inputs["input_ids"]), 4 * _PARTS
    inputs = _with_image_tokens(inputs)
    return {
        **inputs,
        "pixel_values": torch.randn(rows * patches, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        "mm_token_type_ids": (inputs["input_ids"] == _IMAGE).long(),
    }


def _seen_across(inputs: Inputs) -> Inputs:
    """As Llama 3.2 takes them: text layers attend to the first of two tiles, beside the text."""
    generator = torch.Generator().manual_seed(0)
    inputs = _read(inputs)
    rows, columns = inputs["input_ids"].shape
    first = inputs["attention_mask"].argmax(dim=1)
    inputs["input_ids"][torch.arange(rows), first] = _IMAGE
    shown = torch.stack([inputs["attention_mask"], torch.zeros(rows, columns).long()], dim=-1)
    return {
        **inputs,
        "pixel_values": torch.randn(rows, 1, 2, 3, 28, 28, generator=generator),
        "aspect_ratio_ids": torch.ones(rows, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.tensor([[[1, 0]]] * rows),
        "cross_attention_mask": shown[:, :, None],
    }


_CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_LLAVA = Architecture(
    "LlavaForConditionalGeneration",
    "LlavaConfig",
    {"image_token_index": _IMAGE, "pad_token_id": PAD, "eos_token_id": EOS},
    parts={
        "vision_config": ("CLIPVisionConfig", _CLIP),
        "text_config": ("LlamaConfig", LLAMA_LIKE),
    },
)
_QWEN2_5_VL = Architecture(
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLConfig",
    {
        "image_token_id": _IMAGE,
        "video_token_id": _VIDEO,
        "vision_start_token_id": _START,
        "vision_end_token_id": _END,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
    },
    parts={
        "vision_config": (
            "Qwen2_5_VLVisionConfig",
            {
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 2,
                "out_hidden_size": 64,
                "window_size": 28,
                "fullatt_block_indexes": [1],
            },
        ),
        "text_config": (
            "Qwen2_5_VLTextConfig",
            {
                **PLAIN,
                "num_key_value_heads": 2,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [2, 3, 3],
                },
            },
        ),
    },
)
_MLLAMA = Architecture(
    "MllamaForConditionalGeneration",
    "MllamaConfig",
    {"image_token_index": _IMAGE},
    parts={
        "vision_config": (
            "MllamaVisionConfig",
            {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 2,
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 96,
                "image_size": 28,
                "patch_size": 14,
                "max_num_tiles": 2,
                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            },
        ),
        "text_config": (
            "MllamaTextConfig",
            {
                **PLAIN,
                "num_key_value_heads": 2,
                "num_hidden_layers": 3,
                "cross_attention_layers": [1],
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
    },
    gain=2.0,
)
VISION: dict[str, Architecture] = {
    "mllama": replace(_MLLAMA, adapt=_read),
    "mllama, an image": replace(_MLLAMA, adapt=_seen_across),
    "llava": replace(_LLAVA, adapt=_read),
    "llava, an image": replace(_LLAVA, adapt=_seen_by_clip),
    "qwen2_5_vl": replace(_QWEN2_5_VL, adapt=_read),
    "qwen2_5_vl, an image": replace(_QWEN2_5_VL, adapt=_seen_in_patches),
}
