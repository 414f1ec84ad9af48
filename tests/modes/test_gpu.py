"""Rows of mapped blocks on a GPU, through NVIDIA's driver."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from kvpager.plans import Int32
from kvpager.storage.block_storage import BlockStorage

pytestmark = pytest.mark.gpu

LAYERS = [(8, 128, 128)] * 32  # in bfloat16, 16 tokens are 2 MiB: a page


@pytest.fixture(autouse=True)
def bindings() -> None:
    pytest.importorskip("cuda.bindings.driver", reason="kvpager[virtual] is not installed")


def storage(num_blocks: int = 12) -> BlockStorage:
    made = BlockStorage(
        num_blocks, 16, LAYERS, dtype=torch.bfloat16, device="cuda", mode="virtual"
    )  # fmt: skip
    made.tier().normal_()
    return made


def array(*numbers: Any) -> Int32:
    return np.array(numbers, np.int32)


def free_bytes() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def check(made: BlockStorage, rows: Any, row: int, blocks: list[int]) -> None:
    for layer in (0, 31):
        shown, caches = rows.caches(layer), made.caches(layer)
        for one, cache in zip(shown.tensors, caches.tensors, strict=True):
            assert torch.equal(one[row, : 16 * len(blocks)], torch.cat([*cache[blocks]]))


def test_gpu_rows_show_their_blocks_and_share_memory() -> None:
    made = storage()
    assert made.tier().is_cuda
    assert made.block_bytes == 2 << 20
    rows = made.open_rows(3, max_length=64)
    rows.follow(array(0, 2), array([7, 3, 4], [7, 1, -1]))
    check(made, rows, 0, [7, 3, 4])
    check(made, rows, 2, [7, 1])
    made.layer(31)[0][7, 5] = 2.5
    assert bool((rows.caches(31).key[[0, 2], 5] == 2.5).all())


def test_gpu_work_that_is_queued_still_reads_the_blocks_of_its_time() -> None:
    made = storage()
    rows = made.open_rows(2, max_length=64)
    rows.follow(array(0, 1), array([1, 2], [3, 4]))
    wanted = torch.cat([*made.layer(3)[0][[1, 2]]])
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # clock cycles: the host is far ahead of what follows
    seen = rows.caches(3).key[0, :32].clone()
    rows.release(array(1))
    rows.follow(array(0), array([1, 5]))
    assert torch.equal(seen, wanted)
    check(made, rows, 0, [1, 5])


def test_gpu_storage_grows_and_shrinks_and_gives_memory_back() -> None:
    storage(1)  # whatever torch and the driver take once
    before = free_bytes()
    made = storage(64)
    contents = made.tier()[:10].clone()
    rows = made.open_rows(1, max_length=64)
    made.grow(128)
    rows.follow(array(0), array([100, 3]))
    check(made, rows, 0, [100, 3])
    made.shrink(10)
    assert torch.equal(made.tier(), contents)
    rows.follow(array(0), array([3]))
    check(made, rows, 0, [3])
    del made, rows, contents
    assert free_bytes() >= before - (4 << 20)


def test_gpu_that_is_full_says_so_and_keeps_nothing() -> None:
    storage(1)
    before = free_bytes()
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory: .* blocks of 2.0 MiB"):
        BlockStorage(
            2 * (before >> 21), 16, LAYERS, dtype=torch.bfloat16, device="cuda", mode="virtual"
        )
    assert free_bytes() >= before - (4 << 20)


def test_gpu_tensors_in_use_keep_what_they_show() -> None:
    made = storage()
    rows = made.open_rows(1, max_length=64)
    rows.follow(array(0), array([7, 3]))
    held = rows.caches(4).value[0, :32]
    wanted = held.clone()
    rows.detach()
    made.tier().zero_()
    rows.follow(array(0), array([4, 3]))
    assert torch.equal(held, wanted)
    check(made, rows, 0, [4, 3])


def test_gpu_attention_reads_rows_without_a_gather() -> None:
    made = storage()
    rows = made.open_rows(2, max_length=48)
    rows.follow(array(0, 1), array([7, 3, 4], [7, 1, 2]))
    caches = rows.caches(9)
    query = torch.randn(2, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    key, value = (cache[:, :40].transpose(1, 2) for cache in (caches.key, caches.value))
    shown = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key.contiguous(), value.contiguous()
    )
    torch.testing.assert_close(shown, dense, rtol=2e-2, atol=2e-2)
