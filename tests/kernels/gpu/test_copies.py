"""append_kv, gather_kv and copy_blocks in Triton's CPU interpreter: bits of the reference."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvpager.kernels import reference
from kvpager.storage.block_storage import BlockStorage

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip(
        "the kernels are interpreted only under TRITON_INTERPRET=1", allow_module_level=True
    )

import triton
import triton.language as tl

from kvpager.kernels.gpu import copies as copy_kernels
from tests.support import triton_interpreter

triton_interpreter.install()

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KV_CACHE_DTYPES: list[Any] = [None, "int8", "fp8_e4m3"]


def poisoned(num_blocks: int, block_size: int, layers: Any, **options: Any) -> BlockStorage:
    """A storage whose every number and scale is NaN (int8 has none, but its scales do)."""
    storage = BlockStorage(num_blocks, block_size, layers, **options)
    storage.tier().view(torch.uint8).fill_(0xFF)
    return storage


def storages(*arguments: Any, **options: Any) -> tuple[BlockStorage, BlockStorage]:
    return poisoned(*arguments, **options), poisoned(*arguments, **options)


def assert_same_bytes(expected: Tensor, got: Tensor) -> None:
    assert torch.equal(expected.view(torch.uint8), got.view(torch.uint8))


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def slots_for(tokens: int, num_slots: int) -> Tensor:
    """Slots in any order, every fifth token without one."""
    slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(1))[:tokens]
    slots[::5] = -1
    return slots


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
@pytest.mark.parametrize(
    ("block_size", "heads", "key_dim", "value_dim"),
    [(1, 3, 80, 80), (4, 2, 96, 96), (16, 1, 192, 128), (64, 2, 16, 24), (2, 1, 1, 1)],
)
def test_appended_bytes_equal_the_reference(
    dtype: torch.dtype,
    kv_cache_dtype: Any,
    block_size: int,
    heads: int,
    key_dim: int,
    value_dim: int,
) -> None:
    layers = [(1, 8, 8), (heads, key_dim, value_dim)]
    ours, theirs = storages(
        -(-24 // block_size), block_size, layers, dtype=dtype, kv_cache_dtype=kv_cache_dtype
    )
    key = normal(13, heads, key_dim, dtype=dtype)
    value = normal(13, heads, value_dim, dtype=dtype, seed=2)
    slots = slots_for(13, 24)
    copy_kernels.append_kv(key, value, *ours.layer(1), slots, scales=ours.scales(1))
    reference.append_kv(key, value, *theirs.layer(1), slots, scales=theirs.scales(1))
    # All bytes, so that those of other layers, other slots and gaps must be unchanged.
    assert_same_bytes(theirs.tier(), ours.tier())


@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
def test_unusual_numbers_are_quantised_as_by_the_reference(kv_cache_dtype: Any) -> None:
    key = normal(12, 2, 8, dtype=torch.float32)
    key[0] = 0
    key[1] *= 1e-30
    key[2] *= 1e30
    key[3, 0, 4], key[3, 1, 0] = float("inf"), float("-inf")
    key[4, 0, 1], key[4, 1, 7] = float("nan"), -float("nan")
    key[5, 0, 0], key[5, 0, 1] = float("inf"), float("nan")
    key[6] = torch.tensor([-0.0, 0.0] * 4)
    key[7] = 2.0 ** torch.arange(-8, 8).view(2, 8)
    key[8] = 1.4e-45  # the smallest subnormal: its scale rounds to nothing
    # Ties: numbers half way between two steps of int8, and of e4m3 above and below 2^-6.
    key[9, 0] = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, 125.5, -126.5])
    key[9, 1] = torch.tensor([448, 17, 19, 1.0625, 1.1875, 3 * 2**-10, -(2**-10), 5 * 2**-10])
    key[10] = torch.finfo(torch.float32).max
    ours, theirs = storages(3, 4, [(2, 8, 8)], dtype=torch.float32, kv_cache_dtype=kv_cache_dtype)
    slots = torch.arange(12).flip(0)
    for storage, append in ((ours, copy_kernels.append_kv), (theirs, reference.append_kv)):
        append(key, key.flip(0), *storage.layer(0), slots, scales=storage.scales(0))
    tables, lens = torch.arange(3).int()[None], torch.tensor([12])
    for index in range(2):
        options: dict[str, Any] = {"dtype": torch.float32}
        if kv_cache_dtype is not None:
            scales = [storage.scales(0)[index] for storage in (theirs, ours)]  # type: ignore[index]
            # NaNs may differ in their payload.
            torch.testing.assert_close(*scales, rtol=0, atol=0, equal_nan=True)
            options["scales"] = scales[0]
            assert_same_bytes(*(storage.layer(0)[index].contiguous() for storage in (theirs, ours)))
        cache = ours.layer(0)[index]
        expected = reference.gather_kv(cache, tables, lens, 12, **options)
        got = copy_kernels.gather_kv(cache, tables, lens, 12, **options)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert got.isnan().any()


def test_every_float8_is_read_and_written_exactly() -> None:
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = numbers[numbers.isfinite()]
    between = (finite.sort().values[:-1] + finite.sort().values[1:]) / 2
    exact = torch.cat((finite, between, between.nextafter(torch.tensor(500.0)), -between))
    # A first element of 448 makes the scale 1.
    key = torch.cat((torch.full((len(exact), 1, 1), 448.0), exact[:, None, None]), 2)
    ours, theirs = storages(
        len(key), 1, [(1, 2, 2)], dtype=torch.float32, kv_cache_dtype="fp8_e4m3"
    )
    slots = torch.arange(len(key))
    copy_kernels.append_kv(key, key, *ours.layer(0), slots, scales=ours.scales(0))
    reference.append_kv(key, key, *theirs.layer(0), slots, scales=theirs.scales(0))
    assert_same_bytes(theirs.tier(), ours.tier())
    cache = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(16, 16, 1, 1)
    read = copy_kernels.gather_kv(
        cache,
        torch.arange(16).int()[None],
        torch.tensor([256]),
        256,
        scales=torch.ones(16, 16, 1),
        dtype=torch.float32,
    )
    torch.testing.assert_close(read.flatten(), numbers, rtol=0, atol=0, equal_nan=True)


def test_strided_keys_and_slots_of_32_bits_are_taken() -> None:
    packed = normal(9, 3, 2, 40, dtype=torch.bfloat16)
    key, value = packed[:, 0], packed[:, 2].transpose(0, 1).contiguous().transpose(0, 1)
    ours, theirs = storages(4, 4, [(2, 40, 40)], dtype=torch.bfloat16)
    slots = torch.stack((slots_for(9, 16).int(), torch.zeros(9, dtype=torch.int32)), 1)[:, 0]
    copy_kernels.append_kv(key, value, *ours.layer(0), slots)
    reference.append_kv(key, value, *theirs.layer(0), slots)
    assert_same_bytes(theirs.tier(), ours.tier())


def test_no_tokens_and_only_skipped_tokens_change_nothing() -> None:
    ours, theirs = storages(2, 4, [(2, 8, 8)], dtype=torch.float32)
    for tokens in (0, 3):
        key = normal(tokens, 2, 8, dtype=torch.float32)
        copy_kernels.append_kv(key, key, *ours.layer(0), torch.full((tokens,), -1))
    assert_same_bytes(theirs.tier(), ours.tier())


def test_caches_without_contiguous_blocks_use_the_reference() -> None:
    heads_first = torch.zeros(3, 2, 4, 8).transpose(1, 2)
    expected = heads_first.clone()
    key, slots = normal(5, 2, 8, dtype=torch.float32), slots_for(5, 12)
    copy_kernels.append_kv(key, key, heads_first, heads_first.clone(), slots)
    reference.append_kv(key, key, expected, expected.clone(), slots)
    assert torch.equal(heads_first, expected)
    tables, lens = torch.tensor([[2, 0]]), torch.tensor([6])
    assert torch.equal(
        copy_kernels.gather_kv(heads_first, tables, lens, 6),
        reference.gather_kv(expected, tables, lens, 6),
    )


def filled(kv_cache_dtype: Any, dtype: torch.dtype, block_size: int, heads: int, dim: int) -> Any:
    """A layer with tokens in some slots and NaN in the others; tables and lengths for it."""
    storage = poisoned(
        9, block_size, [(heads, dim, dim)], dtype=dtype, kv_cache_dtype=kv_cache_dtype
    )
    tables = torch.tensor([[3, 0, 7, -1], [2, -1, 5, 5], [-1, -1, -1, -1], [8, 1, 4, 6]]).int()
    lens = torch.tensor([2 * block_size + 1, 3 * block_size, 0, 1])
    slots = [
        int(block) * block_size + at % block_size
        for table, length in zip(tables, lens.tolist(), strict=True)
        for at in range(length)
        if (block := table[at // block_size]) >= 0
    ]
    key = normal(len(slots), heads, dim, dtype=dtype)
    reference.append_kv(key, key, *storage.layer(0), torch.tensor(slots), scales=storage.scales(0))
    return storage, tables, lens


@pytest.mark.mostly_slow(quick=3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_cache_dtype", KV_CACHE_DTYPES)
@pytest.mark.parametrize(
    ("block_size", "heads", "dim", "length"),
    [(1, 3, 80, 4), (4, 2, 96, 9), (16, 1, 192, 30), (64, 1, 16, 7), (4, 2, 16, 25)],
)
def test_gathered_tokens_equal_the_reference(
    dtype: torch.dtype, kv_cache_dtype: Any, block_size: int, heads: int, dim: int, length: int
) -> None:
    storage, tables, lens = filled(kv_cache_dtype, dtype, block_size, heads, dim)
    scales = storage.scales(0)
    options = {} if scales is None else {"scales": scales[0], "dtype": dtype}
    got = copy_kernels.gather_kv(storage.layer(0)[0], tables, lens, length, **options)
    assert got.dtype == dtype
    assert got.isfinite().all(), "what lies in slots that no row uses shows"
    expected = reference.gather_kv(storage.layer(0)[0], tables, lens, length, **options)
    assert torch.equal(got, expected)
    assert expected.any()


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("to", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"])
def test_gathered_tokens_may_be_of_another_dtype(kv_cache_dtype: Any, to: torch.dtype) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        storage, tables, lens = filled(kv_cache_dtype, dtype, 4, 2, 16)
        scales = storage.scales(0)
        options: dict[str, Any] = {"scales": scales and scales[0], "dtype": to}
        got = copy_kernels.gather_kv(storage.layer(0)[0], tables.long(), lens.int(), 9, **options)
        expected = reference.gather_kv(storage.layer(0)[0], tables, lens, 9, **options)
        assert got.dtype == to
        assert torch.equal(got, expected)


def test_float64_caches_are_moved_and_rounded() -> None:
    storage, tables, lens = filled(None, torch.float64, 4, 2, 16)
    key, slots = normal(3, 2, 16, dtype=torch.float64), torch.tensor([12, 13, 14])
    copy_kernels.append_kv(key, key, *storage.layer(0), slots)
    cache = storage.layer(0)[1]
    assert torch.equal(cache[3, :3], key)
    for to in (torch.float64, torch.float32):
        got = copy_kernels.gather_kv(cache, tables, lens, 9, dtype=to)
        assert torch.equal(got, reference.gather_kv(cache, tables, lens, 9, dtype=to))


def test_gathering_nothing_gives_zeros_of_the_right_shape() -> None:
    storage, tables, lens = filled(None, torch.float32, 4, 2, 16)
    cache = storage.layer(0)[0]
    for some_tables, some_lens, length in (
        (tables[:0], lens[:0], 3),
        (tables, lens, 0),
        (tables[:, :0], lens * 0, 3),
        (tables, lens * 0, 3),
    ):
        got = copy_kernels.gather_kv(cache, some_tables, some_lens, length)
        assert got.shape == (len(some_lens), length, 2, 16)
        assert not got.any()


def test_tables_may_be_strided() -> None:
    storage, tables, lens = filled(None, torch.float32, 4, 2, 16)
    cache = storage.layer(0)[0]
    expected = reference.gather_kv(cache, tables, lens, 10)
    for given in (torch.stack((tables, tables + 1), 2)[:, :, 0], tables.T.contiguous().T):
        assert torch.equal(copy_kernels.gather_kv(cache, given, lens, 10), expected)


def test_lengths_beyond_the_tables_read_no_block() -> None:
    # The reference refuses them, but the kernel cannot read a GPU's lengths.
    storage, tables, lens = filled(None, torch.float32, 4, 2, 16)
    cache = storage.layer(0)[0]
    got = copy_kernels.gather_kv(cache, tables[:, :2], lens, 10)
    tables[:, 2:] = -1
    assert torch.equal(got, reference.gather_kv(cache, tables, lens, 10))


def random_pairs(chance: random.Random, num_blocks: int, num_pairs: int) -> Tensor:
    """Destinations all different, sources any, so that many blocks are both; some pairs skipped."""
    destinations = chance.sample(range(num_blocks), num_pairs)
    pairs = [[chance.randrange(num_blocks), destination] for destination in destinations]
    for pair in chance.sample(pairs, num_pairs // 4):
        pair[chance.randrange(2)] = -1
    return torch.tensor(pairs, dtype=torch.int32).view(-1, 2)


@pytest.mark.parametrize("num_pairs", [0, 1, 3, 8])
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.float32, (4, 2, 8)),
        (torch.bfloat16, (3, 5, 7)),
        (torch.float16, (2, 128)),
        (torch.int8, (5,)),
        (torch.uint8, (48,)),
        (torch.float64, (3,)),
    ],
)
def test_copied_blocks_equal_the_reference(
    num_pairs: int, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(num_pairs)
    # Small tiles, so that several programs share the work.
    monkeypatch.setattr(copy_kernels, "COPY_TILE_BYTES", 256)
    monkeypatch.setattr(copy_kernels, "COPY_RUN_BYTES", 16)
    storage = torch.randint(0, 120, (11, *shape), generator=torch.Generator().manual_seed(0))
    storage = storage.to(dtype)
    for copies in (random_pairs(chance, 11, num_pairs), random_pairs(chance, 11, num_pairs).long()):
        expected = storage.clone()
        reference.copy_blocks(expected, copies)
        copy_kernels.copy_blocks(storage, copies)
        assert_same_bytes(expected, storage)


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("staging_bytes", [1, 100, 1 << 20])
def test_many_pairs_are_copied_slice_by_slice(
    staging_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_kernels, "COPY_PAIRS_MAX", 2)
    monkeypatch.setattr(copy_kernels, "STAGING_BYTES", staging_bytes)
    chance = random.Random(0)
    for columns in (12, 13):
        storage = normal(6, columns, dtype=torch.float32)
        expected, copies = storage.clone(), random_pairs(chance, 6, 5)
        reference.copy_blocks(expected, copies)
        copy_kernels.copy_blocks(storage, copies)
        assert_same_bytes(expected, storage)


@pytest.mark.parametrize("pairs_max", [8, 2])  # in one launch, and slice by slice
def test_a_pair_with_one_negative_entry_moves_nothing(
    pairs_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy_kernels, "COPY_PAIRS_MAX", pairs_max)
    storage = normal(4, 12, dtype=torch.float32)
    before = storage.clone()
    copy_kernels.copy_blocks(storage, torch.tensor([[2, -1], [-1, 3], [1, -1]]))
    assert_same_bytes(before, storage)


def test_blocks_that_lie_apart_are_copied_alone() -> None:
    whole = normal(5, 20, dtype=torch.bfloat16)
    expected, copies = whole.clone(), torch.tensor([[0, 3], [3, 0], [4, 1]])
    reference.copy_blocks(expected[:, 3:16], copies)
    copy_kernels.copy_blocks(whole[:, 3:16], copies)
    assert torch.equal(whole, expected)
    assert not torch.equal(whole[0], whole[1])


def test_memory_that_starts_anywhere_is_copied() -> None:
    """Memory given to torch may start at an odd address, and a view of it at an even one."""
    raw = np.zeros(256, dtype=np.uint8)
    odd = torch.from_numpy(raw[3:])
    start = -odd.data_ptr() % 16
    storage = odd[start : start + 96].view(3, 32)
    storage[2] = torch.arange(32)
    copy_kernels.copy_blocks(storage, torch.tensor([[2, 0]]))
    assert torch.equal(storage[0], storage[2])
    assert not storage[1].any()


def test_a_copied_block_carries_its_scales() -> None:
    storage, tables, lens = filled("int8", torch.float32, 4, 2, 16)
    scales = storage.scales(0)
    options = {"scales": scales[0], "dtype": torch.float32}
    before = copy_kernels.gather_kv(storage.layer(0)[0], tables, lens, 5, **options)
    copy_kernels.copy_blocks(storage.tier(), torch.tensor([[3, 1], [0, 4], [7, 6]]))
    tables[0] = torch.tensor([1, 4, 6, -1])
    after = copy_kernels.gather_kv(storage.layer(0)[0], tables, lens, 5, **options)
    assert torch.equal(before[0], after[0])


def test_offsets_beyond_32_bits_are_reached() -> None:
    """Blocks 2^30 bytes apart. Untouched pages take no memory."""
    apart, run = 1 << 30, 4 * 2 * 16
    try:
        memory = torch.empty(2 * apart + 4 * run, dtype=torch.int8)
    except RuntimeError as error:  # without memory overcommit
        pytest.skip(str(error))
    key_cache, value_cache = (
        memory.as_strided((3, 4, 2, 16), (apart, 32, 16, 1), at * run) for at in range(2)
    )
    scales = torch.zeros(3, 4, 2), torch.zeros(3, 4, 2)
    key = normal(3, 2, 16, dtype=torch.float32)
    slots = torch.tensor([8, 9, 3])
    copy_kernels.append_kv(key, -key, key_cache, value_cache, slots, scales=scales)
    options: dict[str, Any] = {"dtype": torch.float32}
    tables, lens = torch.tensor([[2]]), torch.tensor([2])
    for cache, its_scales in ((key_cache, scales[0]), (value_cache, scales[1])):
        got = copy_kernels.gather_kv(cache, tables, lens, 2, scales=its_scales, **options)
        expected = reference.gather_kv(cache, tables, lens, 2, scales=its_scales, **options)
        assert torch.equal(got, expected)
        assert expected.all(-1).any()
    runs = memory.as_strided((3, 5), (apart, 1), 2 * run + 1)
    runs[2] = torch.arange(5)
    copy_kernels.copy_blocks(runs, torch.tensor([[2, 0]]))
    assert runs[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_the_repaired_interpreter_computes_narrow_numbers_as_torch_does(dtype: torch.dtype) -> None:
    left, right = normal(32, dtype=dtype), normal(32, dtype=dtype, seed=1)
    results = {
        name: torch.zeros(32, dtype=torch.float32) for name in ("sum", "larger", "less", "narrow")
    }
    compute_narrow[(1,)](left, right, *results.values(), SIZE=32)
    exact = left.float(), right.float()
    assert torch.equal(results["sum"], (exact[0] + exact[1]).to(dtype).float())
    assert torch.equal(results["larger"], torch.maximum(*exact))
    assert torch.equal(results["less"].bool(), exact[0] < exact[1])
    assert torch.equal(results["narrow"], (exact[0] * 1.37).to(dtype).float())


@triton.jit
def compute_narrow(left, right, added, larger, less, narrow, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    x, y = tl.load(left + at), tl.load(right + at)
    tl.store(added + at, (x + y).to(tl.float32))
    tl.store(larger + at, tl.maximum(x, y).to(tl.float32))
    tl.store(less + at, (x < y).to(tl.float32))
    tl.store(narrow + at, (x.to(tl.float32) * 1.37).to(x.dtype).to(tl.float32))
