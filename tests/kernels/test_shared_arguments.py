"""Arguments that steps and layers share: made once, checked once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvpager import ops
from kvpager.ops import (
    AttentionArgs,
    LayerCaches,
    append,
    append_kv,
    paged_attention,
)
from kvpager.storage.block_storage import BlockStorage


@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"])
def test_shared_caches_and_rows_give_the_same_as_single_arguments(kv_cache_dtype: Any) -> None:
    storages = [
        BlockStorage(4, 4, [(2, 8, 8)], dtype=torch.float32, kv_cache_dtype=kv_cache_dtype)
        for _ in range(2)
    ]
    key, value, query = torch.randn(6, 2, 8), torch.randn(6, 2, 8), torch.randn(2, 4, 8)
    slots = torch.tensor([12, 13, 14, 15, 4, 5])
    rows = torch.tensor([[3, 1], [3, -1]], dtype=torch.int32), torch.tensor([6, 4])
    append(key, value, storages[0].caches(0), slots)
    shared = ops.attend(query, storages[0].caches(0), AttentionArgs(*rows))
    caches, scales = storages[1].layer(0), storages[1].scales(0)
    append_kv(key, value, *caches, slots, scales=scales)
    assert torch.equal(shared, paged_attention(query, *caches, *rows, scales=scales))


def test_shared_caches_are_checked_when_made() -> None:
    key, scales = torch.zeros(4, 4, 2, 8), torch.zeros(4, 4, 2)
    with pytest.raises(ValueError, match="value_cache"):
        LayerCaches(key, torch.zeros(4, 4, 3, 8))
    with pytest.raises(TypeError, match="value_cache"):
        LayerCaches(key, key.half())
    with pytest.raises(ValueError, match="has no scales"):
        LayerCaches(key, key, (scales, scales))
    with pytest.raises(ValueError, match="needs scales"):
        LayerCaches(key.to(torch.int8), key.to(torch.int8))


@pytest.mark.parametrize(
    ("key", "value", "slots"),
    [
        (torch.zeros(2, 2, 8), torch.zeros(2, 2, 8), torch.zeros(3).long()),
        (torch.zeros(2, 2, 7), torch.zeros(2, 2, 8), torch.zeros(2).long()),
        (torch.zeros(2, 2, 8), torch.zeros(2, 1, 8), torch.zeros(2).long()),
        (torch.zeros(2, 2, 8), torch.zeros(2, 2, 8), torch.zeros(2)),
        (torch.zeros(2, 2, 8).half(), torch.zeros(2, 2, 8).half(), torch.zeros(2).long()),
        (torch.zeros(2, 8, 2).mT, torch.zeros(2, 8, 2).mT, torch.zeros(2).long()),
        (torch.zeros(16), torch.zeros(2, 2, 8), torch.zeros(2).long()),
    ],
)
def test_tokens_must_fit_shared_caches(key: Tensor, value: Tensor, slots: Tensor) -> None:
    caches = LayerCaches(torch.zeros(4, 4, 2, 8), torch.zeros(4, 4, 2, 8))
    with pytest.raises((ValueError, TypeError)):
        append(key, value, caches, slots)
