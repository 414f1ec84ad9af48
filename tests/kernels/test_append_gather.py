"""Appending, gathering and copying blocks, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvpager.ops import (
    append_kv,
    copy_blocks,
    gather_kv,
)
from tests.support.kernel_cases import (
    ENTRY,
    NAN,
    Kernels,
    slots_of,
    strided_caches,
    tables_for,
)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_appended_tokens_gather_in_order(block_size: int, implementation: Kernels) -> None:
    check_round_trip([3, 17, 1, 0], block_size, length=17, seed=1, kernels=implementation)


def check_round_trip(
    seq_lens: list[int],
    block_size: int,
    length: int,
    seed: int,
    device: str = "cpu",
    kernels: Kernels = ENTRY,
) -> None:
    """Write every row's tokens in one shuffled call, then read the last `length` of each."""
    tables, blocks = tables_for(seq_lens, block_size, seed)
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randn(count, 2, 3, generator=generator) for count in seq_lens]
    values = [torch.randn(count, 2, 5, generator=generator) for count in seq_lens]
    slots = torch.cat(
        [
            slots_of(tables[row], torch.arange(count), block_size)
            for row, count in enumerate(seq_lens)
        ]
    )
    order = torch.randperm(len(slots), generator=generator)
    caches = tuple(
        cache.to(device) for cache in strided_caches(blocks, block_size, 2, 3, 5, torch.float32)
    )
    kernels.append_kv(
        torch.cat(keys)[order].to(device),
        torch.cat(values)[order].to(device),
        caches[0],
        caches[1],
        slots[order].to(device),
    )
    lens = torch.tensor(seq_lens, dtype=torch.int32, device=device)
    for cache, rows in zip(caches, (keys, values), strict=True):
        gathered = kernels.gather_kv(cache, tables.to(device), lens, length).cpu()
        for row, tokens in enumerate(rows):
            padding = torch.zeros(max(0, length - len(tokens)), *tokens.shape[1:])
            expected = torch.cat((padding, tokens[max(0, len(tokens) - length) :]))
            assert torch.equal(gathered[row], expected)


def test_any_history_of_appends_gathers_bit_by_bit(implementation: Kernels) -> None:
    # Imported here because the GPU machine has no hypothesis.
    hypothesis = pytest.importorskip("hypothesis")
    st = pytest.importorskip("hypothesis.strategies")

    @hypothesis.given(
        st.lists(st.integers(0, 40), min_size=1, max_size=5),
        st.sampled_from([1, 2, 8, 16]),
        st.integers(0, 50),
        st.integers(0, 99),
    )
    def round_trip(seq_lens: list[int], block_size: int, length: int, seed: int) -> None:
        check_round_trip(seq_lens, block_size, length, seed, kernels=implementation)

    round_trip()


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [1, 16])
def test_gpu_appended_tokens_gather_in_order(block_size: int) -> None:
    check_round_trip([3, 17, 1, 0], block_size, length=17, seed=1, device="cuda")


@pytest.mark.parametrize("skipped", [[1], [0, 1, 2], []])
def test_a_negative_slot_skips_its_token(skipped: list[int], implementation: Kernels) -> None:
    key_cache, value_cache = strided_caches(2, 4, 1, 2, 2, torch.float32)
    slots = torch.tensor([6, 0, 3])
    slots[skipped] = -1
    key = torch.arange(6.0).view(3, 1, 2)
    implementation.append_kv(key, -key, key_cache, value_cache, slots)
    for token, slot in enumerate([6, 0, 3]):
        found = key_cache[slot // 4, slot % 4]
        if token in skipped:
            assert found.isnan().all()
        else:
            assert torch.equal(found, key[token])
            assert torch.equal(value_cache[slot // 4, slot % 4], -key[token])
    assert int(key_cache.isnan().all(-1).sum()) == 8 - (3 - len(skipped))


def test_append_takes_strided_keys_and_leaves_other_bytes_alone(implementation: Kernels) -> None:
    key_cache, value_cache = strided_caches(2, 4, 3, 2, 2, torch.float32)
    key = torch.randn(3, 4, 2).transpose(0, 1)  # [4 tokens, 3 heads, 2]
    value = torch.randn(4, 3, 5)[..., 2:4]
    implementation.append_kv(key, value, key_cache, value_cache, torch.arange(4, 8))
    assert torch.equal(key_cache[1], key)
    assert torch.equal(value_cache[1], value)
    assert key_cache[0].isnan().all()
    assert value_cache[0].isnan().all()


def test_a_last_dimension_of_one_may_have_any_stride(implementation: Kernels) -> None:
    key_cache, value_cache = strided_caches(2, 4, 2, 1, 1, torch.float32)
    wide = torch.randn(4, 2, 3)
    key, value = wide[..., 1::3], wide[..., 2::3]
    implementation.append_kv(key, value, key_cache, value_cache, torch.arange(4))
    assert torch.equal(key_cache[0], key)
    assert torch.equal(value_cache[0], value)


def test_no_gradient_flows_through_the_cache() -> None:
    key_cache, value_cache = strided_caches(1, 4, 1, 2, 2, torch.float32)
    key = torch.ones(4, 1, 2, requires_grad=True)
    append_kv(key, key, key_cache, value_cache, torch.arange(4))
    assert not key_cache.requires_grad


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"key": torch.zeros(3, 1, 4)}, ValueError, r"key.shape=\[3, 1, 4\]: expected \[tokens"),
        ({"value": torch.zeros(2, 1, 2)}, ValueError, r"value.shape=\[2, 1, 2\]: expected"),
        ({"slots": torch.zeros(2).long()}, ValueError, r"slots.shape=\[2\]: expected"),
        ({"slots": torch.zeros(3)}, TypeError, "slots.dtype=torch.float32: expected torch.int32"),
        (
            {"key": torch.zeros(3, 1, 2).double()},
            TypeError,
            "key.dtype=torch.float64: must equal key_cache",
        ),
        ({"key": torch.zeros(3, 2, 4).mT[..., :1, :]}, ValueError, "pass key.contiguous"),
        ({"value": torch.zeros(3, 2, 4).mT[..., :1, :]}, ValueError, "pass value.contiguous"),
        (
            {"slots": torch.zeros(3, device="meta").long()},
            ValueError,
            "slots.device=meta: expected",
        ),
    ],
)
def test_append_refuses_mismatched_tensors(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    key_cache, value_cache = strided_caches(2, 4, 1, 2, 2, torch.float32)
    token = torch.zeros(3, 1, 2)
    arguments = {"key": token, "value": token, "slots": torch.arange(3), **changes}
    with pytest.raises(error, match=message):
        append_kv(**arguments, key_cache=key_cache, value_cache=value_cache)


def test_gather_refuses_a_negative_length() -> None:
    cache, _ = strided_caches(2, 4, 1, 2, 2, torch.float32)
    with pytest.raises(ValueError, match="length=-1: expected at least 0"):
        gather_kv(cache, torch.zeros(1, 1).int(), torch.ones(1).int(), -1)


def test_gather_in_another_dtype_rounds_once(implementation: Kernels) -> None:
    cache, _ = strided_caches(2, 4, 1, 3, 3, torch.float32)
    cache[1] = torch.randn(4, 1, 3)
    tables, lens = torch.tensor([[1]]).int(), torch.tensor([4])
    gathered = implementation.gather_kv(cache, tables, lens, 4, dtype=torch.bfloat16)
    assert torch.equal(gathered[0], cache[1].bfloat16())
    with pytest.raises(TypeError, match=r"dtype=torch.int32: expected a floating dtype"):
        gather_kv(cache, tables, lens, 4, dtype=torch.int32)


def test_gather_zeroes_tokens_of_freed_blocks(implementation: Kernels) -> None:
    cache, _ = strided_caches(3, 2, 1, 1, 1, torch.float32)
    cache.copy_(torch.arange(1.0, 7.0).view(3, 2, 1, 1))
    cache[1] = NAN
    tables, lens = torch.tensor([[0, -1, 2]]).int(), torch.tensor([5])
    gathered = implementation.gather_kv(cache, tables, lens, 6)
    assert gathered.flatten().tolist() == [0, 1, 2, 0, 0, 5]


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """Fill results of `torch.empty` with NaN, so that unwritten memory shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize(("columns", "seq_lens"), [(0, [0, 0]), (1, [0, 0]), (2, [5, 3])])
def test_rows_without_a_block_read_as_zeros(
    columns: int,
    seq_lens: list[int],
    blocks: int,
    dtype: torch.dtype,
    stored: torch.dtype | None,
    implementation: Kernels,
) -> None:
    cache = torch.ones(blocks, 4, 2, 16).to(stored or dtype)
    scales = None if stored is None else torch.ones(blocks, 4, 2)
    tables, lens = torch.full((2, columns), -1).int(), torch.tensor(seq_lens)
    for length in (0, 1, 4, 9):
        found = implementation.gather_kv(cache, tables, lens, length, scales=scales, dtype=dtype)
        assert torch.equal(found, torch.zeros(2, length, 2, 16, dtype=dtype))
    output = implementation.paged_attention(
        torch.ones(2, 4, 16, dtype=dtype), cache, cache, tables, lens,
        scales=None if scales is None else (scales, scales),
    )  # fmt: skip
    assert torch.equal(output, torch.zeros(2, 4, 16, dtype=dtype))


def test_a_storage_without_blocks_is_written_and_copied_nowhere(implementation: Kernels) -> None:
    cache, token = torch.empty(0, 4, 2, 16), torch.ones(2, 2, 16)
    implementation.append_kv(token, token, cache, cache.clone(), torch.tensor([-1, -1]))
    implementation.copy_blocks(cache, torch.tensor([[-1, -1]]))
    implementation.copy_blocks(cache, torch.empty(0, 2, dtype=torch.int32))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_block_copies_read_everything_before_they_write(
    device: str, dtype: torch.dtype, implementation: Kernels
) -> None:
    storage = torch.arange(24.0, device=device).view(6, 2, 2)
    before = storage.clone()
    copies = torch.tensor([[0, 1], [1, 2], [-1, 3], [2, 0], [4, -1]], dtype=dtype, device=device)
    implementation.copy_blocks(storage, copies)
    assert torch.equal(storage[[1, 2, 0, 3, 4, 5]], before[[0, 1, 2, 3, 4, 5]])


def test_block_copies_may_be_none_at_all(implementation: Kernels) -> None:
    storage = torch.arange(4.0).view(2, 2)
    implementation.copy_blocks(storage, torch.empty(0, 2, dtype=torch.int32))
    implementation.copy_blocks(storage, torch.full((3, 2), -1))
    assert storage.flatten().tolist() == [0, 1, 2, 3]


def test_block_copies_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"copies.shape=\[2, 3\]: expected \[pairs, 2\]"):
        copy_blocks(torch.zeros(2, 2), torch.zeros(2, 3).int())


def test_blocks_that_are_not_contiguous_are_refused() -> None:
    with pytest.raises(ValueError, match="each block has to be one run of memory"):
        copy_blocks(torch.zeros(4, 2, 3).mT, torch.zeros(1, 2).int())
    apart = torch.arange(12.0).view(3, 4)[:, 1:3]  # between other bytes
    copy_blocks(apart, torch.tensor([[0, 2]]))
    assert torch.equal(apart[2], apart[0])
