"""The manager of mode "reserved": a region for each sequence, with the verbs of `BlockManager`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvpager.blocks.protocol import MEMBERS
from kvpager.errors import OutOfBlocks, StaleSequence
from kvpager.modes.reserved_manager import ReservedManager
from kvpager.testing.conformance import PROPERTIES, BlockManagerAdapter, check_properties
from kvpager.testing.properties import ManagerAdapter
from kvpager.testing.setups import Setup
from kvpager.testing.simulator import run, simulate


def reserved_manager(setup: Setup) -> ReservedManager:
    """Return a manager of at most as many blocks as the setup has, in about four regions."""
    region_blocks = max(setup.num_blocks // 4, 1)
    max_length = region_blocks * setup.block_size
    manager = ReservedManager(setup.num_blocks // region_blocks, max_length, setup.block_size)
    del manager.quotas  # otherwise the simulator would set some
    return manager


class RegionAdapter(BlockManagerAdapter):
    """A `ReservedManager` whose sequences hold all blocks of their regions."""

    def block_table(self, handle: Any) -> list[int]:
        table = super().block_table(handle)
        return list(range(table[0], table[0] + self.manager.region_blocks)) if table else []


def adapter(num_blocks: int, block_size: int) -> ManagerAdapter:
    region_blocks = max(num_blocks // 3, 1)
    num_rows = num_blocks // region_blocks
    return RegionAdapter(ReservedManager(num_rows, region_blocks * block_size, block_size))


@pytest.mark.parametrize("name", PROPERTIES)
def test_it_has_every_property_but_that_what_fits_is_served(name: str) -> None:
    """A region is too short for what all regions together could hold: paging replaced this."""
    [result] = check_properties(adapter, properties=[name], block_size=4, histories=20)
    assert result.verdict == ("violated" if name == "served_when_it_fits" else "holds"), result


@pytest.mark.parametrize("seed", range(6))
def test_every_history_reads_back(seed: int) -> None:
    report = simulate(seed, 1_500, make_manager=reserved_manager)
    assert report.ok, report


@pytest.mark.slow
def test_no_property_is_violated_in_many_random_histories() -> None:
    summary = run(150_000, seed=100, processes=2, make_manager=reserved_manager)
    assert not summary.failures, "\n".join(map(str, summary.failures))
    for name in ("refused", "hits", "fork", "truncate", "swap"):
        assert summary.counts[name] > 100, name


def test_it_has_all_members_of_the_protocol() -> None:
    manager = ReservedManager(2, 8, 4)
    assert [name for name in MEMBERS if not hasattr(manager, name)] == []


def test_a_sequence_has_a_region_from_its_first_token_on() -> None:
    manager = ReservedManager(num_rows=2, max_length=10, block_size=4)
    assert manager.num_blocks == 6
    first, second = manager.allocate(1), manager.allocate([5, 6, 7, 8, 9])
    assert manager.block_tables([first, second]).tolist() == [[0, -1], [3, 4]]
    assert manager.append(first, 11).slots.tolist() == list(range(1, 12))
    stats = manager.stats()
    assert (stats.num_held, stats.num_kept, stats.num_free, stats.num_tokens) == (5, 1, 0, 17)
    with pytest.raises(OutOfBlocks, match="need 3 device blocks, 0 free, 0 evictable of 6; a seq"):
        manager.allocate(1)
    with pytest.raises(OutOfBlocks, match="a region has 12 slots; raise max_length"):
        manager.append(first)
    manager.free(second)
    with pytest.raises(StaleSequence):
        manager.append(second)
    assert manager.block_tables(manager.allocate(4)).tolist() == [[3]]


def test_a_fork_is_copied_when_it_grows() -> None:
    manager = ReservedManager(num_rows=3, max_length=12, block_size=4)
    parent = manager.allocate([1, 2, 3, 4, 5])
    one, two = manager.fork(parent, 2)
    step = manager.append([parent, one, two], [[6], [7], [8]])
    assert step.copies.tolist() == [[0, 3], [1, 4], [0, 6], [1, 7]]
    assert step.slots.tolist() == [12 + 5, 24 + 5, 5]  # the last one keeps the region
    assert manager.stats().total_copied == 4
    child = manager.fork(two)
    with pytest.raises(OutOfBlocks):
        manager.append(child)
    manager.free(two)
    assert not len(manager.append(child).copies)


def test_a_known_prefix_is_copied_from_another_region_or_found_in_a_free_one() -> None:
    manager = ReservedManager(num_rows=3, max_length=12, block_size=4)
    first = manager.allocate(range(9))
    assert manager.match_prefix(range(9)) == 0
    manager.commit(first)
    second = manager.allocate([*range(6), 50, 51])
    assert (second.num_cached_tokens, second.copies.tolist()) == (6, [[0, 3], [1, 4]])
    assert manager.allocate(range(9), namespace="other").num_cached_tokens == 0
    manager.free([first, second])
    third = manager.allocate(range(9))
    assert (third.num_cached_tokens, len(third.copies)) == (8, 0)
    assert manager.block_tables(third)[0, 0] == 0
    assert manager.clear_prefix_cache() == 0  # `second` was never committed
    manager.free(third)
    assert manager.clear_prefix_cache() == 3
    assert manager.match_prefix(range(9)) == 0


def test_a_copied_prefix_is_found_after_its_commit_alone() -> None:
    """Copies of one step read before they write, so none may read what another one writes."""
    manager = ReservedManager(num_rows=3, max_length=12, block_size=4)
    first = manager.allocate(range(8))
    manager.commit(first)
    second = manager.allocate(range(8))
    third = manager.allocate([*range(7), 9])
    assert third.copies[:, 0].tolist() == [0, 1]
    manager.free(first)
    manager.commit(second)
    assert manager.match_prefix(range(8)) == 8


def test_a_fork_that_grew_is_found_after_its_commit_alone() -> None:
    manager = ReservedManager(num_rows=3, max_length=12, block_size=4)
    parent = manager.allocate(range(8))
    earlier, filler = manager.allocate(range(8)), manager.allocate(1)
    manager.commit([parent, earlier])
    manager.free(earlier)
    child = manager.fork(parent)
    assert manager.append(child).copies.tolist() == [[0, 3], [1, 4]]  # where `earlier` was
    manager.free(filler)
    assert manager.allocate([*range(7), 9]).copies[:, 0].tolist() == [0, 1]


def test_images_are_not_reused() -> None:
    manager = ReservedManager(num_rows=2, max_length=8, block_size=4)
    seen = [(0, 2, b"image")]
    manager.commit(manager.allocate(range(8), mm_hashes=seen))
    assert manager.match_prefix(range(8), mm_hashes=seen) == manager.match_prefix(range(8)) == 0


def test_reserve_counts_the_unused_blocks_of_regions() -> None:
    manager = ReservedManager(num_rows=2, max_length=16, block_size=4)
    manager.allocate(1)
    manager.allocate(1, reserve=6)
    with pytest.raises(OutOfBlocks):
        ReservedManager(num_rows=1, max_length=16, block_size=4).allocate(1, reserve=4)


def test_what_it_cannot_do_it_says() -> None:
    manager = ReservedManager(num_rows=2, max_length=8, block_size=4)
    sequence = manager.allocate(3)
    with pytest.raises(ValueError, match='mode="reserved" has none'):
        manager.append(sequence, speculative=True)
    with pytest.raises(ValueError, match='mode="reserved" has no quotas'):
        manager.quotas.set("acme", ceiling=3)
    with pytest.raises(OutOfBlocks, match='mode="reserved" has no host tier'):
        manager.swap(sequence, "host")
    assert len(manager.swap(sequence, "device")) == 0
    assert np.array_equal(manager.lengths(manager.batch([sequence])), [3])


def test_a_known_prompt_is_taken_from_a_free_region_before_it_is_copied() -> None:
    manager = ReservedManager(3, 8, 4)
    first, second = manager.allocate([1, 2, 3, 4, 5]), manager.allocate([1, 2, 3, 4, 5])
    manager.commit([first, second])
    manager.free(first)
    third = manager.allocate([1, 2, 3, 4, 6])
    assert (third.num_cached_tokens, len(third.copies)) == (4, 0)
    assert manager.block_tables(second).tolist() == [[2, 3]]
    manager.check()
