"""Calls of `generate` that continue from a cache that another call returned."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")


hypothesis = pytest.importorskip("hypothesis")

from transformers import PreTrainedModel  # noqa: E402

from tests.support import tiny_models  # noqa: E402


@functools.cache
def model_named(name: str) -> PreTrainedModel:
    return tiny_models.tiny_model(name)


def generate(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, **options}
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def tokens(model: PreTrainedModel, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    result: torch.Tensor = generate(model, inputs, **options).sequences
    return result


def longer(output: Any, mask: torch.Tensor, more: torch.Tensor | None = None) -> dict[str, Any]:
    """The next call's inputs: everything so far, then `more`, with its mask."""
    ids = output.sequences if more is None else torch.cat([output.sequences, more], dim=1)
    new = ids.shape[1] - mask.shape[1]
    return {"input_ids": ids, "attention_mask": torch.nn.functional.pad(mask, (0, new), value=1)}


def more_ids(rows: int, seed: int, count: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(3, tiny_models.VOCAB, (rows, count), generator=generator)


BATCHES = {"equal lengths": [13, 13], "left padding": [21, 6, 17]}
NAMES = ["llama", "mistral", "gemma3", "gpt2", "deepseek_v3", "qwen3_next"]
