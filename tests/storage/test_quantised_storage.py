"""Eight-bit storages: where the scales lie, and copies that keep them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvpager.kernels.quantisation import KV_CACHE_DTYPES
from kvpager.storage.block_storage import BlockStorage, LayerShape
from tests.support.storages import UNEQUAL, move, pairs

# Bytes of the parts of a block of UNEQUAL in eight bits with block_size 4, each rounded up to 16:
# key, value, key scales and value scales of each layer.
QUANTISED_PARTS = [64, 32, 32, 32, 64, 64, 16, 16, 24, 72, 48, 48]
QUANTISED_STARTS = [0, 64, 96, 128, 160, 224, 288, 304, 320, 352, 432, 480]


def quantised(kv_cache_dtype: Any, layers: Any = UNEQUAL, **options: Any) -> BlockStorage:
    """Make an eight-bit storage with random bytes in both tiers."""
    storage = BlockStorage(
        6, 4, layers, dtype=torch.bfloat16, kv_cache_dtype=kv_cache_dtype, **options
    )
    for tier in (storage.tier("device"), storage.tier("host")):
        tier.copy_(torch.randint(0, 256, tier.shape, dtype=torch.uint8))
    return storage


def views(storage: BlockStorage) -> list[torch.Tensor]:
    """Return the content of a quantised storage by layer, as bytes: [blocks, bytes] each."""
    found = []
    for layer in range(len(storage.layers)):
        scales = storage.scales(layer)
        assert scales is not None
        found += [*storage.layer(layer), *scales]
    return [view.contiguous().view(torch.uint8).view(len(view), -1).clone() for view in found]


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_eight_bits_keep_their_scales_inside_the_block(kv_cache_dtype: Any) -> None:
    storage = quantised(kv_cache_dtype, num_host_blocks=2)
    assert (storage.dtype, storage.kv_cache_dtype) == (torch.bfloat16, kv_cache_dtype)
    assert (storage.tier().dtype, storage.block_bytes) == (torch.uint8, 528)
    assert (storage.nbytes, storage.host_nbytes) == (6 * 528, 2 * 528)
    assert f"torch.bfloat16 as {kv_cache_dtype}" in repr(storage)
    parts = iter(zip(QUANTISED_STARTS, QUANTISED_PARTS, strict=True))
    for index, (heads, key_dim, value_dim) in enumerate(UNEQUAL):
        scales = storage.scales(index)
        assert scales is not None
        for cache, dim in zip(storage.layer(index), (key_dim, value_dim), strict=True):
            check_part(
                storage, cache, (6, 4, heads, dim), KV_CACHE_DTYPES[kv_cache_dtype], *next(parts)
            )
        for scale in scales:
            check_part(storage, scale, (6, 4, heads), torch.float32, *next(parts))


def check_part(
    storage: BlockStorage,
    view: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    start: int,
    size: int,
) -> None:
    assert (view.shape, view.dtype) == (shape, dtype)
    for block in range(len(view)):
        assert view[block].is_contiguous()
        address = storage.tier().data_ptr() + block * storage.block_bytes + start
        assert view[block].data_ptr() == address
        assert address % 16 == 0
        assert view[block].nbytes == size


def test_an_unquantised_storage_has_no_scales_or_gaps() -> None:
    storage = BlockStorage(2, 1, [LayerShape(1, 3, 1)] * 3, dtype=torch.bfloat16)
    assert storage.kv_cache_dtype is None
    assert storage.scales(0) is None
    assert storage.tier().dtype == torch.bfloat16
    assert storage.block_bytes == 3 * 4 * 2
    assert [cache.storage_offset() for i in range(3) for cache in storage.layer(i)] == [
        *(0, 3, 4, 7, 8, 11)
    ]
    with pytest.raises(IndexError, match="layer=3: expected 0 to 2"):
        storage.scales(3)


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_scales_write_through(kv_cache_dtype: Any) -> None:
    storage = quantised(kv_cache_dtype)
    scales = storage.scales(1)
    assert scales is not None
    scales[1][5, 3, 0] = 2.5
    assert storage.tier()[5, 304 + 12 : 304 + 16].view(torch.float32).item() == 2.5


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_copies_carry_scales_bit_by_bit(kv_cache_dtype: Any) -> None:
    storage = quantised(kv_cache_dtype)
    before = views(storage)
    storage.copy(pairs((0, 1), (1, 2), (2, 0), (-1, 5)))
    for old, new in zip(before, views(storage), strict=True):
        assert torch.equal(new, old[[2, 0, 1, 3, 4, 5]])


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_scales_swap_to_the_host_and_back(kv_cache_dtype: Any) -> None:
    storage = quantised(kv_cache_dtype, num_host_blocks=4)
    before = views(storage)
    storage.apply(move("device", "host", (1, 3), (4, 0)))
    storage.tier().zero_()
    storage.apply(move("host", "device", (3, 5), (0, 2)))
    for old, new in zip(before, views(storage), strict=True):
        assert torch.equal(new[[5, 2]], old[[1, 4]])
        assert new[[0, 1, 3, 4]].eq(0).all()


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_scales_stay_when_the_storage_grows_shrinks_and_loses_layers(kv_cache_dtype: Any) -> None:
    storage = quantised(kv_cache_dtype, num_host_blocks=3)
    before, host = views(storage), storage.tier("host").clone()
    storage.grow(9)
    storage.shrink(4)
    storage.keep_layers(2)
    assert storage.block_bytes == 320
    assert torch.equal(storage.tier("host"), host[:, :320])
    found = views(storage)
    assert len(found) == 8
    for old, new in zip(before, found, strict=False):
        assert torch.equal(new, old[:4])
    scales = storage.scales(1)
    assert scales is not None
    scales[0].fill_(1.5)
    assert storage.tier()[:, 288:304].reshape(-1).view(torch.float32).eq(1.5).all()


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_gpu_copies_and_swaps_carry_scales(kv_cache_dtype: Any) -> None:
    storage = quantised(kv_cache_dtype, num_host_blocks=4, device="cuda")
    before = views(storage)
    storage.copy(pairs((0, 1)))
    storage.apply(move("device", "host", (3, 2)))
    storage.apply(move("host", "device", (2, 5)))
    for old, new in zip(before, views(storage), strict=True):
        assert torch.equal(new, old[[0, 0, 2, 3, 4, 3]])


@pytest.mark.parametrize("kv_cache_dtype", [None, "int8", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_block_are_known_in_advance(dtype: torch.dtype, kv_cache_dtype: Any) -> None:
    layers = [LayerShape(3, 24, 20), LayerShape(1, 5, 7)]
    storage = BlockStorage(2, 8, layers, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    foreseen = BlockStorage.bytes_of_a_block(8, layers, dtype=dtype, kv_cache_dtype=kv_cache_dtype)
    assert foreseen == storage.block_bytes == storage.nbytes // 2
