"""Replay through a pool and tiers: where blocks are found, and what is written."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvpager.simulate.generate import generate_trace
from kvpager.simulate.replay import Result, Trace, number_prefixes, replay
from kvpager.simulate.tiers import TIERS, replay_tiers
from kvpager.storage.tiers.layout import BlockLayout


def trace_of(*prompts: list[int]) -> Trace:
    return number_prefixes("by hand", prompts)


def figures(result: Result) -> tuple[int, list[tuple[int, int]]]:
    """Return the hits of the pool, and the hits of each tier and its writes."""
    return result.hits, [(tier.hits, tier.written) for tier in result.tiers]


@pytest.mark.parametrize("name", TIERS)
def test_a_block_that_left_the_pool_is_found_below(name: str) -> None:
    trace = trace_of([1, 2], [1, 2], [3, 4], [1, 2, 5])
    result = replay_tiers(trace, 3, "lru", {name: 9})
    assert figures(result) == (2 + 1, [(1, 5)])
    assert (result.blocks, result.tiers[0].name, result.tiers[0].capacity) == (9, name, 9)


@pytest.mark.parametrize(
    ("tier", "size", "written"),
    [("host", 3, 3 + 3), ("host", 4, 6 + 2), ("disk", 3, 3 + 3), ("disk", 4, 4 + 2)],
)
def test_tiers_admit_blocks_as_the_engine_does(tier: str, size: int, written: int) -> None:
    """Small ones and disks take what is offered twice once full; a host of four pools all."""
    trace = trace_of(*([number] for number in (1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1)))
    result = replay_tiers(trace, 1, "lru", {tier: size})
    assert result.tiers[0].written == written


def test_a_block_from_the_lower_tier_rises() -> None:
    trace = trace_of([1], [2], [3], [4], [3], [4], [3])
    result = replay_tiers(trace, 1, "lru", {"host": 2, "disk": 9})
    assert figures(result) == (0, [(1, 2 + 2), (2, 4)])


def test_a_host_alone_takes_only_what_leaves_next() -> None:
    trace = trace_of(*([number] * 50 for number in range(20)))
    alone = replay_tiers(trace, 1200, "lru", {"host": 9000})
    beside = replay_tiers(trace, 1200, "lru", {"host": 9000, "disk": 9000})
    # 201 blocks are free. The next 512 to leave are these and 311 others, which 7 prompts hold.
    assert [tier.written for tier in alone.tiers] == [7 * 50]
    assert [tier.written for tier in beside.tiers] == [1000, 1000]


def test_a_prompt_longer_than_the_pool_counts_its_hits() -> None:
    trace = trace_of([1, 2], [3, 4], [1, 2, 5])
    result = replay_tiers(trace, 2, "lru", {"host": 8})
    assert figures(result) == (0, [(2, 4)])
    assert result.too_long == 1


@pytest.mark.parametrize("tiers", [{"host": 2000}, {"host": 150, "disk": 2000}])
def test_large_tiers_find_every_repeated_block(tiers: dict[str, int]) -> None:
    trace = generate_trace(80, seed=5)
    result = replay_tiers(trace, 200, "lru", tiers)
    found = result.hits + sum(tier.hits for tier in result.tiers)
    assert found == trace.num_blocks - trace.num_prefixes
    assert result.hits == replay(trace, 200, "lru").hits


def test_equal_replays_have_equal_results() -> None:
    trace = generate_trace(60, seed=3)
    told: list[int] = []
    one, two = (
        replay_tiers(trace, 100, "lru", {"host": 100, "disk": 300}, told.append) for _ in range(2)
    )
    assert replace(one, seconds=0) == replace(two, seconds=0)
    assert one.tiers[1].hits > 0
    assert sum(told) == 2 * 60


def test_the_simulated_disk_answers_as_a_disk(tmp_path: Path) -> None:
    pytest.importorskip("xxhash")
    from kvpager.storage.tiers.disk.slot_table import RECORD_BYTES
    from kvpager.storage.tiers.disk.store import DiskStore

    layout, random = BlockLayout("simulated", 1), np.random.default_rng(0)
    simulated = TIERS["disk"](20, layout=layout)
    real = DiskStore(tmp_path / "kv", 20 * (2 * 4096 + RECORD_BYTES) + 4096, layout=layout)
    assert real.stats().capacity == simulated.stats().capacity == 20
    assert real.admit == simulated.admit  # type: ignore[attr-defined]
    lost = [store.losses.follow() for store in (real, simulated)]
    block = memoryview(bytearray(1))
    for _ in range(150):
        numbers = random.choice(40, random.integers(1, 9), replace=False).tolist()
        keys = [number.to_bytes(32, "little") for number in numbers]
        blocks, deadline = [block] * len(keys), time.monotonic() + 1e6
        call = "save" if random.random() < 0.7 else "load"
        answers = [
            getattr(store, call)(keys, blocks, deadline).tolist() for store in (real, simulated)
        ]
        assert answers[0] == answers[1]
        assert [*lost[0]] == [*lost[1]]
    assert lost[0]
    real.close()
