"""Prompts and settings for transformers' continuous batching."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import GenerationConfig, PreTrainedModel  # noqa: E402
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching.requests import (  # noqa: E402
    RequestStatus,
)

FINISHED, FAILED, DECODING = (
    RequestStatus.FINISHED,
    RequestStatus.FAILED,
    RequestStatus.DECODING,
)
NEW = 6
SMALL = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64)


def some_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = some_prompts(5, 19, 9)


def settings(**options: Any) -> GenerationConfig:
    return GenerationConfig(**{"max_new_tokens": NEW, "do_sample": False, **options})


def one_by_one(model: PreTrainedModel, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """Return the tokens that greedy search of `generate` adds to each prompt."""
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    found = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), **options)[0].tolist()
        found.append(ids[1:] if model.config.is_encoder_decoder else ids[len(prompt) :])
    return found


def eos_of(model: PreTrainedModel) -> Any:
    """Return the model's eos token, which transformers does not add to a config."""
    return model.generation_config.eos_token_id
