"""Rows of a storage: each shows its blocks in order, whatever happened to them before."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvpager.modes import page_pool
from kvpager.plans import Int32
from kvpager.storage.block_storage import BlockStorage
from kvpager.testing.simulator import simulate
from tests.support.row_memory import RowMemory

LAYERS = [(2, 8, 8), (1, 16, 4)]  # unequal heads and head sizes


def storage(num_blocks: int = 12, mode: Any = "virtual", **options: Any) -> BlockStorage:
    return BlockStorage(num_blocks, 4, LAYERS, dtype=torch.float32, mode=mode, **options)


def numbered(num_blocks: int = 12, mode: Any = "virtual", **options: Any) -> BlockStorage:
    """Return a storage in which every number of every block differs."""
    made = storage(num_blocks, mode, **options)
    for index in range(len(LAYERS)):
        for which, cache in enumerate(made.layer(index)):
            numbers = torch.arange(cache.numel(), dtype=torch.float32).view(cache.shape)
            cache.copy_(numbers + (10 * index + which) * 100_000)
    return made


def array(*numbers: Any) -> Int32:
    return np.array(numbers, np.int32)


def expected(made: BlockStorage, layer: int, which: int, blocks: list[int]) -> torch.Tensor:
    """Return the tokens of blocks in order; zeros for -1."""
    cache = made.layer(layer)[which]
    parts = [cache[block] if block >= 0 else torch.zeros_like(cache[0]) for block in blocks]
    return torch.cat(parts)


def check_rows(made: BlockStorage, rows: Any, tables: dict[int, list[int]]) -> None:
    for layer in range(len(LAYERS)):
        caches = rows.caches(layer)
        for which, cache in enumerate((caches.key, caches.value)):
            for row, blocks in tables.items():
                whole = blocks + [-1] * (rows.num_blocks - len(blocks))
                assert torch.equal(cache[row], expected(made, layer, which, whole))


def test_a_row_shows_its_blocks_in_order_and_zeros_behind_them() -> None:
    made = numbered()
    rows = made.open_rows(3, max_length=20)
    rows.follow(array(0, 2), array([7, 3, 4, 5], [1, 0, -1, -1]))
    check_rows(made, rows, {0: [7, 3, 4, 5], 1: [], 2: [1, 0]})


def test_a_shared_block_is_one_memory_at_several_addresses() -> None:
    made = numbered()
    rows = made.open_rows(2, max_length=8)
    rows.follow(array(0, 1), array([5, 6], [5, 7]))
    made.layer(1)[0][5, 2] = -1.0
    assert (rows.caches(1).key[:, 2] == -1.0).all()
    rows.caches(1).value[0, 3] = -2.0  # a kernel may write through the row
    assert (made.layer(1)[1][5, 3] == -2.0).all()
    check_rows(made, rows, {0: [5, 6], 1: [5, 7]})


def test_following_replaces_shortens_and_releases() -> None:
    made = numbered()
    rows = made.open_rows(2, max_length=16)
    for table in ([1, 2, 3, 4], [1, 9, 3, 4], [1, 9], [9, 1, 2], [-1, -1, 2], [2, 3, 4, 5]):
        rows.follow(array(1), array(table))
        check_rows(made, rows, {0: [], 1: table})
    rows.release(array(1))
    check_rows(made, rows, {0: [], 1: []})


def test_an_unchanged_batch_maps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = numbered()
    rows = made.open_rows(3, max_length=16)
    rows.follow(array(2, 0, 1), array([1, 2], [3, 4], [5, -1]))

    def refuse(*_: Any) -> None:
        raise AssertionError("mapped again")

    monkeypatch.setattr(page_pool, "_map", refuse)
    rows.follow(array(2, 0, 1), array([1, 2], [3, 4], [5, -1]))
    rows.follow(array(0, 1, 2), array([3, 4, -1], [5, -1, -1], [1, 2, -1]))
    with pytest.raises(AssertionError, match="mapped again"):
        rows.follow(array(0), array([3, 5]))


def test_neighbours_are_mapped_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = storage(20)
    rows = made.open_rows(2, max_length=40)
    calls: list[int] = []
    real = page_pool._map
    monkeypatch.setattr(page_pool, "_map", lambda *args: (calls.append(args[1]), real(*args)))
    rows.follow(array(0), array([4, 5, 6, 7, 2, 3, -1, -1]))
    assert [size // made.block_bytes for size in calls] == [4, 2]
    calls.clear()
    rows.release(array(0))
    assert [size // made.block_bytes for size in calls] == [6]
    calls.clear()
    rows.follow(array(0, 1), array([*range(10)], [*range(10, 20)]))
    assert [size // made.block_bytes for size in calls] == [20]  # rows are neighbours, too


def test_rows_stay_right_after_an_interrupted_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made = numbered()
    rows = made.open_rows(1, max_length=16)
    rows.follow(array(0), array([1, 2, 3, 4]))
    real = page_pool._map

    def interrupted(*args: Any) -> None:
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(page_pool, "_map", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rows.follow(array(0), array([7, 2, 9, 4]))
    monkeypatch.setattr(page_pool, "_map", real)
    rows.follow(array(0), array([1, 2, 3, 4]))  # as before the interrupt
    check_rows(made, rows, {0: [1, 2, 3, 4]})


@pytest.mark.parametrize("change", ["grow", "shrink", "keep_layers"])
def test_contents_survive_a_change_of_the_storage(change: str) -> None:
    made = numbered()
    before = [[cache[:10].clone() for cache in made.layer(index)] for index in range(2)]
    rows = made.open_rows(2, max_length=16)
    rows.follow(array(0), array([7, 2, 9]))
    getattr(made, change)({"grow": 20, "shrink": 10, "keep_layers": 1}[change])
    for index in range(len(made.layers)):
        for cache, old in zip(made.layer(index), before[index], strict=True):
            assert torch.equal(cache[:10], old)
    if change == "keep_layers":
        rows = made.open_rows(2, max_length=16)
    rows.follow(array(0), array([7, 2, 9]))
    made.layer(0)[0][2, 1] = -3.0
    assert torch.equal(rows.caches(0).key[0, :12], expected(made, 0, 0, [7, 2, 9]))


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8_e4m3"])
def test_rows_of_eight_bits_have_their_scales(kv_cache_dtype: Any) -> None:
    made = storage(6, kv_cache_dtype=kv_cache_dtype)
    for index in range(2):
        for tensor in made.caches(index).tensors:
            numbers = torch.arange(tensor.numel()).remainder(100).view(tensor.shape)
            tensor.copy_(numbers.to(tensor.dtype))
    rows = made.open_rows(1, max_length=12)
    rows.follow(array(0), array([4, 1, 2]))
    for index in range(2):
        for shown, cache in zip(
            rows.caches(index).tensors, made.caches(index).tensors, strict=True
        ):
            assert torch.equal(shown[0].float(), torch.cat([*cache[[4, 1, 2]]]).float())


def test_views_of_rows_outlive_the_storage() -> None:
    made = numbered()
    rows = made.open_rows(1, max_length=8)
    rows.follow(array(0), array([3, 1]))
    key = rows.caches(0).key[0]
    wanted = expected(made, 0, 0, [3, 1])
    del made, rows
    assert torch.equal(key, wanted)


@pytest.mark.parametrize("seed", range(6))
def test_every_history_reads_back_through_rows(seed: int) -> None:
    report = simulate(seed, 1_500, make_memory=RowMemory)
    assert report.ok, report


def test_the_simulator_notices_a_row_that_does_not_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvpager.modes.virtual import VirtualRows

    real = VirtualRows._map

    def forgetful(self: VirtualRows, rows: Int32, columns: Any, blocks: Int32) -> None:
        real(self, rows, columns, np.where(columns == 2, np.minimum(blocks, 0), blocks))

    monkeypatch.setattr(VirtualRows, "_map", forgetful)
    reports = [simulate(seed, 1_500, make_memory=RowMemory, shrinking=False) for seed in range(4)]
    assert any(not report.ok for report in reports)


def test_modes_without_rows_say_so() -> None:
    with pytest.raises(ValueError, match='mode="paged": rows are not runs of memory'):
        storage(mode="paged").open_rows(1, 8)
    with pytest.raises(ValueError, match="mode='flat': expected one of"):
        storage(mode="flat")
    with pytest.raises(ValueError, match=r"vm\.max_map_count=\d+: up to \d+ mappings are"):
        storage().open_rows(100_000, 400)
    with pytest.raises(ValueError, match='mode="virtual": needs an NVIDIA GPU, or device="cpu"'):
        storage(device="meta")


def test_reserved_rows_are_the_regions_of_the_pool() -> None:
    made = numbered(mode="reserved")
    rows = made.open_rows(3, max_length=16)
    rows.follow(array(0, 2), array([0, 1, 2], [8, 9, -1]))
    check_rows(made, rows, {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8, 9, 10, 11]})
    with pytest.raises(ValueError, match=r"tables\[1, 0\]=3: expected 4"):
        rows.follow(array(0, 1), array([0], [3]))
    with pytest.raises(ValueError, match="num_rows=4: 4 blocks are reserved for each row"):
        made.open_rows(4, max_length=16)


def test_detached_tensors_keep_what_they_show() -> None:
    made = numbered()
    rows = made.open_rows(2, max_length=12)
    rows.follow(array(0, 1), array([7, 3, -1], [3, 2, 5]))
    held = rows.caches(1).key[1, 2:10]
    wanted = held.clone()
    rows.detach()
    made.tier()[:] = -1.0  # other sequences write into the blocks
    rows.follow(array(0, 1), array([4, 3, 1], [9, -1, -1]))
    assert torch.equal(held, wanted)
    check_rows(made, rows, {0: [4, 3, 1], 1: [9]})


def test_detaching_copies_nothing_if_no_tensor_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made = numbered()
    rows = made.open_rows(2, max_length=12)
    rows.follow(array(0), array([7, 3, -1]))
    total = rows.caches(0).key.sum() + rows.caches(1).value[0, :5].sum()
    monkeypatch.setattr(page_pool.AddressRange, "part_from_pages", None)
    rows.detach()
    check_rows(made, rows, {0: [7, 3], 1: []})
    assert total > 0


def test_rows_of_all_storages_together_stay_below_the_bound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    bound = tmp_path / "max_map_count"
    bound.write_text(str(page_pool._OTHER_MAPPINGS + sum(page_pool._ranges.values()) + 100))
    monkeypatch.setattr(page_pool, "_MAX_MAP_COUNT", bound)
    first = storage().open_rows(10, max_length=20)  # 5 blocks and a rest in each row
    with pytest.raises(ValueError, match=r"vm\.max_map_count=\d+: up to \d+ mappings are needed"):
        storage().open_rows(10, max_length=20)
    del first
    storage().open_rows(10, max_length=20)
