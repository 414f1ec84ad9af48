"""Tiny random-weight transformers models, one of each kind of attention that kvpager meets."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCAB = 128
PAD, EOS = 0, 2

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
_LLAMA_LIKE: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_FULL_AND_SLIDING = ["sliding_attention", "full_attention"]

# name -> (model class, configuration class, its arguments)
_DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA_LIKE),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA_LIKE),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_LLAMA_LIKE, "sliding_window": 8}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**_LLAMA_LIKE, **_EXPERTS}),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_LLAMA_LIKE, "sliding_window": 8, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_LLAMA_LIKE,
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**_LLAMA_LIKE, **_EXPERTS, "sliding_window": 8, "layer_types": _FULL_AND_SLIDING},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1536},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            **_TOKENS,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 1536,
            "word_embed_proj_dim": 64,
        },
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4, "tie_word_embeddings": False},
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {**_TOKENS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_TOKENS,
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
        },
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            **_LLAMA_LIKE,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}
_ENCODER_DECODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
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
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **_TOKENS,
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
        },
    ),
}
_ALL = _DECODERS | _ENCODER_DECODERS

# How wide weights are spread; more where text would be constant otherwise.
_GAIN = {"bloom": 3.0, "t5": 2.5, "bart": 4.0, "opt": 3.0}

DECODERS = list(_DECODERS)
ENCODER_DECODERS = list(_ENCODER_DECODERS)


def tiny_model(
    name: str, *, seed: int = 0, attention: str | None = None, **changes: Any
) -> PreTrainedModel:
    """The same model for the same name, seed and changes to its configuration, in float32 and
    evaluation mode."""
    model_class, config_class, arguments = _ALL[name]
    config = getattr(transformers, config_class)(**{**arguments, **changes})
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, model_class)(config)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                # Wide enough apart that greedy text varies and rounding decides no token.
                fan_in = parameter.shape[-1]
                parameter.normal_(0, _GAIN.get(name, 1.5) / fan_in**0.5, generator=generator)
    return model.eval()


def prompts(lengths: list[int], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths as one left-padded batch: `input_ids`, `attention_mask`."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(lengths)
    input_ids = torch.full((len(lengths), columns), PAD)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        input_ids[row, columns - length :] = ids
        mask[row, columns - length :] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def assert_equal_but_for_near_ties(paged: Any, expected: Any, prompt_length: int) -> None:
    """Two exact attentions round bf16 differently: a token may differ only where two are level."""
    for row in range(len(expected.sequences)):
        differ = (paged.sequences[row] != expected.sequences[row]).nonzero()
        if len(differ):
            step = int(differ[0]) - prompt_length
            best, second = expected.logits[step][row].float().topk(2).values.tolist()
            assert best - second < 0.25, f"row {row}, step {step}: margin {best - second}"
