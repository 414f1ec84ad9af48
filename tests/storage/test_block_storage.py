"""BlockStorage: the place of every byte, and copies, swaps and growth that keep it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvpager.blocks.manager import BlockManager
from kvpager.plans import NO_COPIES, CopyPlan, Tier
from kvpager.storage.block_storage import BlockStorage, LayerShape
from tests.support.storages import EQUAL, UNEQUAL, move, numbered, pairs


def test_equal_layers_are_the_documented_six_dimensions() -> None:
    storage = numbered()
    whole = storage.tier().view(6, 3, 2, 4, 2, 8)
    for index in range(3):
        key, value = storage.layer(index)
        assert torch.equal(key, whole[:, index, 0])
        assert torch.equal(value, whole[:, index, 1])


@pytest.mark.parametrize("layers", [EQUAL, UNEQUAL])
def test_a_block_is_one_run_of_bytes_through_all_layers(layers: Any) -> None:
    storage = numbered(layers=layers)
    for block in range(storage.num_blocks):
        address = storage.tier().data_ptr() + block * storage.block_bytes
        for index in range(len(layers)):
            for cache in storage.layer(index):
                assert cache[block].is_contiguous()
                assert cache[block].data_ptr() == address
                address += cache[block].nbytes
        assert address == storage.tier().data_ptr() + (block + 1) * storage.block_bytes


def test_layers_may_differ_in_heads_and_head_sizes() -> None:
    storage = numbered(layers=UNEQUAL)
    for index, (heads, key_dim, value_dim) in enumerate(UNEQUAL):
        key, value = storage.layer(index)
        assert key.shape == (6, 4, heads, key_dim)
        assert value.shape == (6, 4, heads, value_dim)


def test_layer_views_write_through() -> None:
    storage = numbered()
    storage.layer(1)[1][5, 3, 1, 7] = 123.0
    assert storage.tier().view(6, 3, 2, 4, 2, 8)[5, 1, 1, 3, 1, 7] == 123.0


def test_sizes_are_reported_in_bytes_and_blocks() -> None:
    storage = BlockStorage(8, 16, EQUAL, dtype=torch.bfloat16, num_host_blocks=3)
    assert storage.block_bytes == 3 * 2 * 16 * 2 * 8 * 2
    assert storage.nbytes == 8 * storage.block_bytes
    assert storage.host_nbytes == 3 * storage.block_bytes
    assert (storage.num_blocks, storage.num_host_blocks, storage.block_size) == (8, 3, 16)
    assert storage.layers == tuple(EQUAL)
    assert storage.dtype == torch.bfloat16
    assert storage.device == torch.device("cpu")


def test_copy_moves_whole_blocks_and_reads_before_it_writes() -> None:
    storage = numbered()
    before = storage.tier().clone()
    storage.copy(pairs((0, 1), (1, 2), (2, 0), (-1, 5)))
    assert torch.equal(storage.tier()[[1, 2, 0]], before[[0, 1, 2]])
    assert torch.equal(storage.tier()[3:], before[3:])


def test_copying_nothing_changes_nothing() -> None:
    storage = numbered()
    before = storage.tier().clone()
    storage.copy(NO_COPIES)
    storage.apply(CopyPlan(NO_COPIES, "device", "host"))
    assert torch.equal(storage.tier(), before)


def test_copies_of_a_plan_may_be_read_only() -> None:
    storage = numbered()
    copies = pairs((0, 1))
    copies.flags.writeable = False
    storage.copy(copies)
    assert torch.equal(storage.tier()[1], storage.tier()[0])


COPIES = [
    ((0, 3), (1, 4), (2, 5)),  # one run
    ((0, 0), (2, 1), (3, 2), (5, 5)),  # runs broken in the source
    ((0, 1), (1, 0)),  # descending in the destination
    ((4, 2),),
]


@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize(("source", "destination"), [("device", "host"), ("host", "device")])
def test_a_plan_moves_exactly_its_blocks_bit_by_bit(
    source: Tier, destination: Tier, copies: tuple[tuple[int, int], ...]
) -> None:
    check_move(numbered(num_host_blocks=6), source, destination, copies)


def check_move(
    storage: BlockStorage, source: Tier, destination: Tier, copies: tuple[tuple[int, int], ...]
) -> None:
    sources = storage.tier(source).clone()
    expected = storage.tier(destination).clone()
    for block, target in copies:
        expected[target] = sources[block].to(expected.device)
    storage.apply(move(source, destination, *copies))
    assert torch.equal(storage.tier(destination), expected)
    assert torch.equal(storage.tier(source), sources)


@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"])
def test_blocks_move_to_another_storage_bit_by_bit(kv_cache_dtype: Any) -> None:
    made: dict[str, Any] = {"dtype": torch.float32, "kv_cache_dtype": kv_cache_dtype}
    here = BlockStorage(6, 4, [(2, 8, 8), (1, 4, 8)], **made)
    there = BlockStorage(3, 4, [(2, 8, 8), (1, 4, 8)], **made)
    for storage in (here, there):
        as_bytes = storage.tier().view(torch.uint8)
        as_bytes.copy_(torch.randint(0, 256, as_bytes.shape, dtype=torch.uint8))
    theirs, before = here.tier().view(torch.uint8), there.tier().view(torch.uint8).clone()
    there.copy_from(here, np.array([[5, 0], [1, 2]], np.int32))
    after = there.tier().view(torch.uint8)
    assert torch.equal(after, torch.stack([theirs[5], before[1], theirs[1]]))


def test_unknown_blocks_and_other_shapes_are_not_copied() -> None:
    here = BlockStorage(6, 4, [(2, 8, 8)], dtype=torch.float32)
    pairs = np.array([[0, 0]], np.int32)
    for other in (
        BlockStorage(6, 4, [(2, 8, 4)], dtype=torch.float32),
        BlockStorage(6, 8, [(2, 8, 8)], dtype=torch.float32),
        BlockStorage(6, 4, [(2, 8, 8)], dtype=torch.bfloat16),
        BlockStorage(6, 4, [(2, 8, 8)], dtype=torch.float32, mode="reserved"),
    ):
        with pytest.raises(ValueError, match="expected the layers, dtypes, block size and mode"):
            here.copy_from(other, pairs)
    smaller = BlockStorage(2, 4, [(2, 8, 8)], dtype=torch.float32)
    for wrong in ([[2, 0]], [[0, 6]], [[-1, 0]], [[0, -1]]):
        with pytest.raises(ValueError, match=r"block -?\d+: expected"):
            here.copy_from(smaller, np.array(wrong, np.int32))


def test_a_plan_within_one_tier_reads_before_it_writes() -> None:
    storage = numbered(num_host_blocks=4)
    before = storage.tier("host").clone()
    storage.apply(move("host", "host", (0, 1), (1, 0)))
    assert torch.equal(storage.tier("host")[:2], before[[1, 0]])


def test_growing_keeps_every_byte_and_renews_the_views() -> None:
    storage = numbered(num_host_blocks=2)
    before, host = storage.tier().clone(), storage.tier("host").clone()
    storage.grow(6)
    storage.grow(9)
    assert storage.num_blocks == 9
    assert torch.equal(storage.tier()[:6], before)
    assert torch.equal(storage.tier("host"), host)
    key, _ = storage.layer(2)
    assert key.shape[0] == 9
    key[8] = 7.0
    assert torch.equal(storage.tier().view(9, 3, 2, 4, 2, 8)[8, 2, 0], torch.full((4, 2, 8), 7.0))


def test_a_pool_and_its_storage_shrink_together() -> None:
    storage = numbered()
    manager = BlockManager(6, 4)
    first, second = manager.allocate(12), manager.allocate(8)
    expected = storage.tier()[manager.block_tables(second)[0]].clone()
    manager.free(first)
    storage.apply(manager.shrink(3))
    storage.shrink(3)
    assert storage.tier().shape[0] == storage.layer(0)[0].shape[0] == manager.num_blocks == 3
    assert torch.equal(storage.tier()[manager.block_tables(second)[0]], expected)
    with pytest.raises(ValueError, match="expected at most 3"):
        storage.shrink(4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 0}, "num_blocks=0: expected at least 1"),
        ({"block_size": 12}, "block_size=12: expected a power of two"),
        ({"block_size": 0}, "block_size=0: expected at least 1"),
        ({"layers": []}, "layers: expected at least one"),
        ({"layers": [LayerShape(2, 0, 8)]}, r"layers\[0\].head_dim=0: expected at least 1"),
        ({"num_host_blocks": -1}, "num_host_blocks=-1: expected at least 0"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"num_blocks": 4, "block_size": 16, "layers": EQUAL, **changes}
    with pytest.raises(ValueError, match=message):
        BlockStorage(**sizes, dtype=torch.float32)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.int8, r"dtype=torch.int8: expected a floating dtype"),
        (
            torch.float8_e4m3fn,
            r"dtype=torch.float8_e4m3fn: expected at least 16 bits. Set kv_cache_dtype",
        ),
        ("float32", "dtype='float32': expected a torch.dtype"),
    ],
)
def test_a_dtype_without_arithmetic_is_refused(dtype: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        BlockStorage(4, 16, EQUAL, dtype=dtype)


@pytest.mark.parametrize("kv_cache_dtype", ["int4", "fp8", torch.int8])
def test_an_unknown_kv_cache_dtype_is_refused(kv_cache_dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"expected one of 'int8', 'fp8_e4m3' or None"):
        BlockStorage(4, 16, EQUAL, dtype=torch.float32, kv_cache_dtype=kv_cache_dtype)


def test_unknown_blocks_are_refused_and_nothing_is_copied() -> None:
    storage = numbered(num_host_blocks=2)
    before = storage.tier().clone()
    with pytest.raises(ValueError, match="destination block 6: expected -1 to 5"):
        storage.copy(pairs((0, 1), (0, 6)))
    with pytest.raises(ValueError, match="source block 2: expected 0 to 1"):
        storage.apply(move("host", "device", (0, 0), (2, 1)))
    with pytest.raises(ValueError, match=r"copies.shape=\[2\]: expected int32 \[n, 2\]"):
        storage.copy(np.array([0, 1], np.int32))
    assert torch.equal(storage.tier(), before)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(IndexError, match="layer=3: expected 0 to 2"):
        numbered().layer(3)


def test_storage_never_shrinks() -> None:
    with pytest.raises(ValueError, match="num_blocks=5: expected at least 6"):
        numbered().grow(5)


@pytest.mark.gpu
@pytest.mark.parametrize("copies", COPIES)
@pytest.mark.parametrize(("source", "destination"), [("device", "host"), ("host", "device")])
def test_gpu_blocks_swap_with_page_locked_memory(
    source: Tier, destination: Tier, copies: tuple[tuple[int, int], ...]
) -> None:
    storage = numbered("cuda", num_host_blocks=6)
    assert storage.tier("host").is_pinned()
    check_move(storage, source, destination, copies)


@pytest.mark.gpu
def test_gpu_copy_and_growth_keep_every_byte() -> None:
    storage = numbered("cuda")
    before = storage.tier().clone()
    storage.copy(pairs((0, 1), (1, 0), (-1, 3)))
    storage.grow(9)
    assert torch.equal(storage.tier()[:2], before[[1, 0]])
    assert torch.equal(storage.tier()[2:6], before[2:])


@pytest.mark.parametrize(
    "change",
    [
        lambda storage: None,
        lambda storage: storage.grow(4),
        lambda storage: storage.shrink(2),
        lambda storage: storage.keep_layers(1),
    ],
    ids=["made", "grown", "shrunk", "layers dropped"],
)
def test_storage_made_in_inference_mode_is_writable_outside(
    change: Callable[[BlockStorage], None],
) -> None:
    layers = [LayerShape(1, 8, 8)] * 2
    with torch.inference_mode():
        storage = BlockStorage(3, 4, layers, dtype=torch.float32, num_host_blocks=2)
    for tier in (storage.tier(), storage.tier("host")):
        tier.fill_(1)
    with torch.inference_mode():
        change(storage)
    storage.layer(0)[0][1].fill_(2)
    storage.tier("host")[1].fill_(3)
    assert storage.layer(0)[0][0].eq(1).all()
    assert storage.layer(0)[0][1].eq(2).all()
    assert storage.tier("host")[0].eq(1).all()


def test_dropping_last_layers_frees_their_memory_and_keeps_the_first() -> None:
    storage = BlockStorage(3, 4, [LayerShape(1, 8, 8)] * 3, dtype=torch.float32, num_host_blocks=1)
    for layer in range(3):
        storage.layer(layer)[0].fill_(layer)
        storage.layer(layer)[1].fill_(10 + layer)
    storage.tier("host").fill_(7)
    storage.keep_layers(2)
    assert storage.nbytes == 3 * 2 * 2 * 4 * 8 * 4
    assert len(storage.layers) == 2
    assert storage.layer(1)[0].eq(1).all()
    assert storage.layer(1)[1].eq(11).all()
    assert storage.tier("host").eq(7).all()
    for count in (0, 3):
        with pytest.raises(ValueError, match="expected 1 to 2"):
            storage.keep_layers(count)
