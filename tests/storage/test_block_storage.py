"""BlockStorage: the place of every byte, and copies, swaps and growth that keep it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from kvpager.blocks.manager import BlockManager
from kvpager.kernels.quantisation import KV_CACHE_DTYPES
from kvpager.plans import NO_COPIES, Plan, Tier
from kvpager.storage import memory, streams
from kvpager.storage.block_storage import BlockStorage, LayerShape
from tests.support.fake_devices import fake_devices, late_copies

EQUAL = [LayerShape(2, 8, 8)] * 3
UNEQUAL = [LayerShape(2, 8, 4), LayerShape(1, 16, 16), LayerShape(3, 2, 6)]


def numbered(device: str = "cpu", layers: Any = EQUAL, **options: Any) -> BlockStorage:
    """Make a storage whose elements all differ, in both tiers."""
    storage = BlockStorage(6, 4, layers, dtype=torch.float32, device=device, **options)
    for tier in (storage.tier("device"), storage.tier("host")):
        tier.copy_(torch.arange(tier.numel(), dtype=torch.float32).view(tier.shape))
    storage.tier("host").neg_()
    return storage


def pairs(*copies: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(copies, np.int32).reshape(-1, 2)


def move(source: Tier, destination: Tier, *copies: tuple[int, int]) -> Plan:
    return Plan(pairs(*copies), source, destination)


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
    storage.apply(Plan(NO_COPIES, "device", "host"))
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
    ):
        with pytest.raises(ValueError, match="must have the layers, dtypes and block size"):
            here.copy_from(other, pairs)
    smaller = BlockStorage(2, 4, [(2, 8, 8)], dtype=torch.float32)
    for wrong in ([[2, 0]], [[0, 6]], [[-1, 0]], [[0, -1]]):
        with pytest.raises(ValueError, match=r"block -?\d+: must be"):
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
        ({"layers": []}, "layers: must not be empty"),
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
        (torch.int8, r"dtype=torch.int8: must be a floating dtype"),
        (
            torch.float8_e4m3fn,
            r"dtype=torch.float8_e4m3fn: must have at least 16 bits. Set kv_cache_dtype",
        ),
        ("float32", "dtype='float32': must be a torch.dtype"),
    ],
)
def test_a_dtype_without_arithmetic_is_refused(dtype: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        BlockStorage(4, 16, EQUAL, dtype=dtype)


@pytest.mark.parametrize("kv_cache_dtype", ["int4", "fp8", torch.int8])
def test_an_unknown_kv_cache_dtype_is_refused(kv_cache_dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"must be None or one of \['int8', 'fp8_e4m3'\]"):
        BlockStorage(4, 16, EQUAL, dtype=torch.float32, kv_cache_dtype=kv_cache_dtype)


def test_unknown_blocks_are_refused_and_nothing_is_copied() -> None:
    storage = numbered(num_host_blocks=2)
    before = storage.tier().clone()
    with pytest.raises(ValueError, match="destination block 6: must be -1 to 5"):
        storage.copy(pairs((0, 1), (0, 6)))
    with pytest.raises(ValueError, match="source block 2: must be 0 to 1"):
        storage.apply(move("host", "device", (0, 0), (2, 1)))
    with pytest.raises(ValueError, match=r"copies.shape=\[2\]: must be int32 \[n, 2\]"):
        storage.copy(np.array([0, 1], np.int32))
    assert torch.equal(storage.tier(), before)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    with pytest.raises(IndexError, match="layer=3: must be 0 to 2"):
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
        with pytest.raises(ValueError, match="must be 1 to 2"):
            storage.keep_layers(count)


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
    with pytest.raises(IndexError, match="layer=3: must be 0 to 2"):
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


# ---------------------------------------------------------------- streams, page-locked memory


@dataclass(eq=False)
class LoggedStream:
    """A stream that logs the streams it waits for."""

    name: str
    log: list[str]

    def wait_stream(self, other: LoggedStream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Streams:
    """Two fake streams on a CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.first, self.second = LoggedStream("first", self.log), LoggedStream("second", self.log)
        self.current = self.first
        self.kept: list[tuple[int, str]] = []
        self.capturing = False
        monkeypatch.setattr(streams, "current_stream", lambda device: self.current)
        monkeypatch.setattr(streams, "is_capturing", lambda: self.capturing)
        monkeypatch.setattr(streams, "keep_for", self.keep)

    def keep(self, tensor: torch.Tensor, stream: LoggedStream) -> None:
        self.kept.append((tensor.data_ptr(), stream.name))

    def take_log(self) -> list[str]:
        log, self.log[:] = list(self.log), []
        return log


@pytest.fixture
def two_streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


USES: dict[str, Callable[[BlockStorage], object]] = {
    "layer": lambda storage: storage.layer(0),
    "tier": lambda storage: storage.tier(),
    "copy": lambda storage: storage.copy(pairs((0, 1))),
}


@pytest.mark.parametrize("use", USES)
def test_a_cpu_storage_never_asks_for_streams(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(device: torch.device) -> None:
        raise AssertionError("a CPU has no streams")

    storage = numbered()
    monkeypatch.setattr(streams, "current_stream", asked)
    USES[use](storage)


@pytest.mark.parametrize("use", USES)
def test_a_stream_waits_for_other_streams_that_used_the_blocks(
    use: str, two_streams: Streams
) -> None:
    storage = numbered()
    for _ in range(3):
        USES[use](storage)
    assert two_streams.take_log() == []  # work on one stream is in order
    two_streams.current = two_streams.second
    USES[use](storage)
    assert two_streams.take_log() == ["second waits for first"]
    two_streams.current = two_streams.first
    USES[use](storage)
    assert two_streams.take_log() == ["first waits for second"]


@pytest.mark.parametrize(
    "change",
    [lambda s: s.grow(9), lambda s: s.shrink(2), lambda s: s.keep_layers(1)],
    ids=["grow", "shrink", "keep_layers"],
)
def test_a_new_tensor_is_filled_between_old_and_new_writes(
    change: Callable[[BlockStorage], None],
    two_streams: Streams,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = numbered()
    old = storage.tier().data_ptr()
    two_streams.current = two_streams.second
    storage.layer(0)
    two_streams.current = two_streams.first
    two_streams.take_log()

    def allocate(*arguments: Any, **options: Any) -> torch.Tensor:
        two_streams.log.append("a new tensor")
        return memory.allocate(*arguments, **options)

    monkeypatch.setattr("kvpager.storage.block_storage.allocate", allocate)
    change(storage)
    log = [line for line in two_streams.take_log() if "first waits for first" not in line]
    assert log[:2] == ["first waits for second", "a new tensor"]
    assert log[-1] == "second waits for first"
    new = storage.tier().data_ptr()
    assert {(old, "first"), (old, "second"), (new, "first"), (new, "second")} <= set(
        two_streams.kept
    )


def test_a_stream_that_records_a_graph_waits_for_no_other(two_streams: Streams) -> None:
    storage = numbered()
    two_streams.current, two_streams.capturing = two_streams.second, True
    storage.layer(0)
    assert two_streams.take_log() == []


@pytest.mark.parametrize(
    "touch",
    [
        lambda storage: storage.tier("host").fill_(0),
        lambda storage: storage.apply(Plan(pairs((5, 0)), "host", "host")),
        lambda storage: storage.apply(Plan(pairs((0, 0)), "device", "host")),
        lambda storage: storage.keep_layers(1),
    ],
    ids=["by hand", "copy within", "swap out", "layers dropped"],
)
def test_host_memory_is_not_written_during_a_copy_from_it(
    touch: Callable[[BlockStorage], None],
) -> None:
    with fake_devices() as fake_device, late_copies() as stream:
        layers = [LayerShape(1, 8, 8)] * 2
        storage = BlockStorage(
            6, 4, layers, dtype=torch.float32, device=fake_device(0), num_host_blocks=6
        )
        storage.tier("host").copy_(torch.arange(6.0 * 128).view(6, 128))
        storage.apply(Plan(pairs((0, 1), (2, 3)), "host", "device"))
        assert stream.num_made < len(stream.copies)
        touch(storage)
        found = storage.tier().cpu()
    expected = torch.arange(6.0 * 128).view(6, 128)
    width = found.shape[1]
    assert torch.equal(found[[1, 3]], expected[[0, 2], :width])


class Runtime:
    """The page-locking part of the CUDA runtime, logging its calls."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        if not self.code:
            self.locked[address] = num_bytes
        return self.code

    def cudaHostUnregister(self, address: int) -> int:
        ctypes.string_at(address, self.locked.pop(address))  # still allocated
        return 0


def with_runtime(monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def test_pinned_memory_is_exact_and_unlocked_with_its_last_view(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = Runtime()
    with_runtime(monkeypatch, runtime)
    storage = BlockStorage(9, 16, [LayerShape(2, 64, 64)], dtype=torch.bfloat16, pinned=True)
    assert list(runtime.locked.values()) == [storage.nbytes]
    assert all(address % 4096 == 0 for address in runtime.locked)
    key = storage.layer(0)[0]
    key.fill_(3)
    storage.grow(18)
    assert sorted(runtime.locked.values()) == [storage.nbytes // 2, storage.nbytes]
    assert storage.layer(0)[0][:9].eq(3).all()
    del storage
    gc.collect()
    assert len(runtime.locked) == 1
    assert key.eq(3).all()
    del key
    gc.collect()
    assert runtime.locked == {}


def test_pages_that_cannot_be_locked_are_torchs_error(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(code=2)
    with_runtime(monkeypatch, runtime)
    monkeypatch.setattr(torch.cuda, "CudaError", lambda code: RuntimeError(f"CUDA error {code}"))
    with pytest.raises(RuntimeError, match="CUDA error 2"):
        BlockStorage(9, 16, [LayerShape(2, 64, 64)], dtype=torch.bfloat16, pinned=True)


def test_pinned_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="pinned='no': expected True or False"):
        BlockStorage(9, 16, [LayerShape(2, 64, 64)], dtype=torch.bfloat16, pinned="no")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_page_locked_memory_without_a_gpu_is_refused() -> None:
    with pytest.raises(RuntimeError, match="pinned=True: needs a GPU"):
        BlockStorage(9, 16, [LayerShape(2, 64, 64)], dtype=torch.bfloat16, pinned=True)


@pytest.mark.gpu
def test_gpu_growth_keeps_what_another_stream_is_still_writing() -> None:
    storage, side = numbered("cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side):
        key, _ = storage.layer(0)
        torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
        key.fill_(7)
    storage.grow(9)
    assert storage.layer(0)[0][:6].eq(7).all()


@pytest.mark.gpu
def test_gpu_blocks_copied_from_host_memory_keep_their_content() -> None:
    storage = numbered("cuda", num_host_blocks=6)
    expected = storage.tier("host")[:3].clone()
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    storage.apply(Plan(pairs((0, 0), (1, 1), (2, 2)), "host", "device"))
    storage.tier("host").fill_(0)
    assert torch.equal(storage.tier()[:3].cpu(), expected)
