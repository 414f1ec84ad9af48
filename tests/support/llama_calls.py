"""A tiny llama, a long prompt, and calls of `generate` on it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import PreTrainedModel

import kvpager
from tests.support import tiny_models


@functools.cache
def llama() -> PreTrainedModel:
    model = tiny_models.tiny_model("llama")
    COMPUTED[model] = tiny_models.Computed(model)
    return model


# Made with the model: a hook that comes later makes it another one.
COMPUTED: dict[PreTrainedModel, tiny_models.Computed] = {}


@functools.cache
def long_prompt() -> torch.Tensor:
    return tiny_models.prompts([1000], seed=4)["input_ids"]


def generate(model: PreTrainedModel, inputs: Any, **options: Any) -> Any:
    if isinstance(inputs, torch.Tensor):
        inputs = {"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, **options}
    return model.generate(**inputs, return_dict_in_generate=True, **options)


def tokens(model: PreTrainedModel, inputs: Any, **options: Any) -> torch.Tensor:
    result: torch.Tensor = generate(model, inputs, **options).sequences
    return result


@functools.cache
def block_bytes() -> int:
    with kvpager.patch(llama()) as patch:
        output = generate(llama(), tiny_models.prompts([20]))
        stats = patch.stats()
        del output
    return stats.held_bytes // stats.num_held_blocks
