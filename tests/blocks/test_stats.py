"""Statistics and metrics of a manager."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvpager import BlockManager
from kvpager.blocks.stats import BlockStatus, Metrics
from tests.support.prefixes import A, B, cache, committed


def test_stats_and_block_states_add_up_in_every_state() -> None:
    manager = BlockManager(12, 4, 4, null_block=True, fences=True)
    pinned = committed(manager, A)
    manager.pins.pin(pinned)
    manager.free(pinned)
    cache(manager, B)
    manager.fork(manager.allocate(4))
    manager.allocate(4)
    manager.swap(manager.allocate(8), "host")
    stats, states = manager.stats(), manager.queries.block_statuses()
    counts = {state.name: int((states == state).sum()) for state in BlockStatus}
    assert counts == {"FREE": 5, "CACHED": 1, "HELD": 1, "SHARED": 1, "KEPT": 3, "RESERVED": 1}
    assert (stats.num_free, stats.num_cached, stats.num_kept, stats.num_shared) == (5, 1, 3, 1)
    assert stats.num_held == counts["HELD"] + counts["SHARED"]
    assert (stats.num_host_free, stats.num_swapped, stats.num_sequences) == (2, 1, 4)
    assert stats.num_never_used <= stats.num_free
    manager.check()


def metrics(manager: BlockManager, **arguments: object) -> Callable[..., float | None]:
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    registry.register(Metrics(manager, **arguments))  # type: ignore[arg-type]
    return lambda name, **labels: registry.get_sample_value(name, labels)


def test_prometheus_reads_blocks_by_state() -> None:
    manager = BlockManager(8, 4)
    pinned = committed(manager, A)
    manager.pins.pin(pinned)
    manager.free(pinned)
    cache(manager, B)
    manager.allocate(8)
    read = metrics(manager, block_bytes=10)
    found = {s: read("kvpager_blocks", state=s) for s in ("free", "held", "cached", "kept")}
    assert found == {"free": 4, "held": 2, "cached": 1, "kept": 1}


def test_prometheus_reads_prefix_hits_and_swapped_bytes() -> None:
    manager = BlockManager(8, 4, 8)
    cache(manager, A)
    sequence = manager.allocate(A + B)
    manager.swap(sequence, "host")
    manager.swap(sequence, "device", at_most=1)
    read = metrics(manager, block_bytes=10)
    assert read("kvpager_prefix_queries_total") == 2
    assert read("kvpager_prefix_hits_total") == 1
    assert read("kvpager_prefix_query_tokens_total") == 12
    assert read("kvpager_prefix_hit_tokens_total") == 4
    out, back = manager.stats().total_swapped_out, manager.stats().total_swapped_in
    assert read("kvpager_swap_bytes_total", tier="host") == 10 * out == 20
    assert read("kvpager_swap_bytes_total", tier="device") == 10 * back == 10


def test_prometheus_metrics_follow_the_manager_and_take_another_prefix() -> None:
    manager = BlockManager(8, 4)
    read = metrics(manager, block_bytes=1, prefix="mine")
    assert read("mine_sequences") == 0
    manager.allocate(5)
    assert (read("mine_sequences"), read("mine_tokens")) == (1, 5)
    assert read("kvpager_sequences") is None
