"""Where a backend puts each number of a block: found for any packing, or refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvpager.storage.tiers.agreement import CommonLayout
from tests.support.vllm_cross_stack import pack_transposed
from tests.support.vllm_parts import (
    HostRows,
    KvpagerOffloadingWorker,
    Slots,
    caches_of,
    interface,
    page_order,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Write = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def packing(seed: int) -> Write:
    """Return a backend that puts the numbers of a page anywhere."""

    def write(keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor) -> None:
        room = pages[0].numel()
        both = torch.cat([keys.flatten(), values.flatten()])
        order = torch.randperm(room, generator=torch.Generator().manual_seed(seed))
        pages.view(-1)[order[: len(both)]] = both

    return write


@given(
    seed=st.integers(0, 1000),
    tokens=st.sampled_from([1, 4, 32]),
    layer=st.tuples(st.integers(1, 4), st.integers(1, 20), st.integers(1, 20)),
    spare=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=30, deadline=None)
def test_any_packing_is_found(
    seed: int, tokens: int, layer: tuple[int, int, int], spare: int, dtype: torch.dtype
) -> None:
    heads, key_dim, value_dim = layer
    total = tokens * heads * (key_dim + value_dim)
    pages = torch.zeros(2, total + spare, dtype=dtype)
    order = page_order.page_order(packing(seed), pages, tokens, layer)
    keys = torch.randn(tokens, heads, key_dim).to(dtype)
    values = torch.randn(tokens, heads, value_dim).to(dtype)
    packing(seed)(keys, values, pages[:1], torch.arange(tokens))
    assert torch.equal(pages[0][torch.from_numpy(order.keys)], keys.flatten())
    assert torch.equal(pages[0][torch.from_numpy(order.values)], values.flatten())


def lossy(keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor) -> None:
    pack_transposed(keys[:-1], values[:-1], pages, slots[:-1])


def twice(keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor) -> None:
    pack_transposed(keys, keys, pages, slots)


def scaled(keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor) -> None:
    pack_transposed(keys * 2, values * 2, pages, slots)


@pytest.mark.parametrize("write", [lossy, twice, scaled])
def test_a_backend_that_keeps_other_numbers_is_refused(write: Write) -> None:
    with pytest.raises(ValueError, match="do not hold each number of a block exactly once"):
        page_order.page_order(write, torch.zeros(3, 2, 8, 8), 8, (2, 4, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_chunk", [1, 4])
def test_rows_have_the_common_layout_and_come_back_to_other_pages(
    tmp_path: Path, dtype: torch.dtype, per_chunk: int
) -> None:
    """Against `CommonLayout`, which shows what numbers a block holds."""
    tokens, layers = 4, 3
    name = str(dtype).removeprefix("torch.")
    common = CommonLayout.of(tokens * per_chunk, [(2, 4, 4)] * layers, name)
    page_bytes = tokens * 2 * 8 * dtype.itemsize
    caches = caches_of([list(range(layers))], 24, page_bytes)
    keys, values = (torch.randn(layers, 24 * tokens, 2, 4).to(dtype) for _ in range(2))
    orders = []
    for layer, cache in enumerate(caches.tensors):
        pages = cache.tensor.view(dtype).view(24, 2, tokens, 8)
        pack_transposed(keys[layer], values[layer], pages, torch.arange(24 * tokens))
        orders.append(page_order.page_order(pack_transposed, pages, tokens, (2, 4, 4)))
    row_bytes = common.layout.block_bytes + 128  # padded
    rows = HostRows("w", 4, row_bytes, num_processes=2, folder=str(tmp_path))
    settings = {"rank": 0, "block_bytes": layers * page_bytes, "blocks_per_chunk": per_chunk}
    worker = KvpagerOffloadingWorker(caches, rows, orders=orders, **settings)

    blocks = [[9, 3, 7, 1], [2, 8, 0, 5]]
    saved = [block for chunk in blocks for block in chunk[:per_chunk]]
    device = interface.GPULoadStoreSpec(saved, [len(saved)], [0])
    worker.submit_store(0, device, Slots([2, 1]))
    parts = list(common.parts(rows.rows[[2, 1], : common.layout.block_bytes]))
    slots = [block * tokens + token for block in saved for token in range(tokens)]
    for layer in range(layers):
        for part, made in zip(parts[2 * layer :], (keys, values), strict=False):
            assert np.array_equal(part, made[layer, slots].flatten(1).float())

    before = [cache.tensor.clone() for cache in caches.tensors]
    other = list(range(24 - len(saved), 24))
    for cache in caches.tensors:
        cache.tensor[other] = 0
    worker.submit_load(1, Slots([2, 1]), interface.GPULoadStoreSpec(other, [len(other)], [0]))
    for cache, old in zip(caches.tensors, before, strict=True):
        assert torch.equal(cache.tensor[other], old[saved])
        assert torch.equal(cache.tensor[: other[0]], old[: other[0]])


def config_of(layer: Any, num_blocks: int) -> tuple[Any, Any]:
    context = {"layers.0": layer}
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=context),
        cache_config=SimpleNamespace(block_size=8),
    )
    group = SimpleNamespace(layer_names=["layers.0"])
    return vllm_config, SimpleNamespace(kv_cache_groups=[group], num_blocks=num_blocks)


@pytest.mark.parametrize("fault", [None, "smaller pages", "lossy"])
def test_a_layer_is_asked_with_its_own_code(fault: str | None) -> None:
    class Impl:
        def do_kv_cache_update(self, asked: Any, *args: Any) -> None:
            assert asked is layer
            (lossy if fault == "lossy" else pack_transposed)(*args)

    layer = SimpleNamespace(impl=Impl())
    pages = {"layers.0": torch.zeros(6, 2, 8, 8)}
    configs = config_of(layer, 3 if fault == "smaller pages" else 6)
    common = CommonLayout.of(8, [(2, 4, 4)], "float32")
    if fault is None:
        [order] = page_order.page_orders(*configs, pages, common)
        assert len(order.keys) == 64
        return
    with pytest.raises(NotImplementedError, match=r"cross_stack: layers\.0: its"):
        page_order.page_orders(*configs, pages, common)
