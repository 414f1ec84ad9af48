"""Architectures that read more than ids: encoders and decoders, vision and language."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.conformance.architectures import (
    EOS,
    LLAMA_LIKE,
    PAD,
    PLAIN,
    SLIDING,
    TOKENS,
    VOCAB,
    Architecture,
    Inputs,
)

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
