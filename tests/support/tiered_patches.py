"""Patches over tiers, and the prompt that they serve."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

import kvpager
from tests.support import tiny_models
from tests.support.llama_calls import generate
from tests.support.tiered_engines import DEAR, patient_tiering


def one(seed: int = 0) -> dict[str, torch.Tensor]:
    return tiny_models.prompts([100], seed=seed)


def ids(model: Any, inputs: Any, **options: Any) -> list[list[int]]:
    found: list[list[int]] = generate(model, inputs, **options).sequences.tolist()
    return found


@contextlib.contextmanager
def patched(model: Any, tiers: Any, **options: Any) -> Iterator[kvpager.Patch]:
    """A patch whose fetches take as long as a busy machine needs, and that leaves nothing held."""
    with patient_tiering():
        options = {"prefix_cache": True, "costs": DEAR} | options
        patch = kvpager.patch(model, tiers=tiers, **options)
    opened = patch.prompt_tiers
    assert opened is not None
    manager, tiering = opened._pool.manager, opened._tiering
    with patch:
        yield patch
        manager.check()
    manager.check()
    staging: Any = tiering._staging
    assert staging.num_free == staging.num_slots
    assert tiering.stats().num_fetching == 0


def saved_by(model: Any, tiers: Any, inputs: Any, **options: Any) -> None:
    with patched(model, tiers, **options) as patch:
        generate(model, inputs)
        assert patch.stats().prefix_hit_tokens == 0
