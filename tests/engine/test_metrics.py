"""Prometheus reads the counts of an engine."""

from __future__ import annotations

import urllib.request

import pytest

from kvpager.engine.metrics import EngineMetrics, EngineStats
from kvpager.storage.tiers.protocol import StoreStats
from kvpager.storage.tiers.tiering_stats import TieringStats, TierStats
from tests.support.scrapes import scrape
from tests.support.toy_runner import ToyEngine

PROMPT = list(range(10))


def test_prometheus_reads_requests_steps_and_blocks() -> None:
    with ToyEngine() as engine:
        read = scrape(EngineMetrics(engine))
        for _ in range(2):
            engine.ask(PROMPT, 4).result(60)
    stats = engine.stats()  # the engine has ended, so that no count changes
    assert read("kvpager_steps_total") == stats.scheduler.total_steps > 0
    assert read("kvpager_computed_tokens_total") == stats.scheduler.total_tokens
    assert read("kvpager_reused_tokens_total") == stats.scheduler.total_reused_tokens > 0
    assert read("kvpager_busy_seconds_total") == stats.busy_seconds > 0
    assert read("kvpager_requests", state="running") == 0
    assert read("kvpager_blocks", state="cached") == stats.pool.num_cached > 0
    assert read("kvpager_prefix_hits_total") == 1
    assert read("kvpager_tiers_fetches") is None  # this engine has none


def test_prometheus_reads_a_request_that_waits() -> None:
    with ToyEngine() as engine, engine.pause():
        read = scrape(EngineMetrics(engine))
        engine.ask(PROMPT, 4)
        assert read("kvpager_requests", state="waiting") == 1


def test_prometheus_reads_preemptions_and_swapped_bytes() -> None:
    with ToyEngine(14, 14) as engine:
        read = scrape(EngineMetrics(engine))
        with engine.pause():
            streams = [engine.ask([seed, *PROMPT], 24) for seed in range(4)]
        for stream in streams:
            stream.result(60)
    counts = engine.stats().scheduler
    kinds = [counts.total_preempted_by_swap, counts.total_preempted_by_recompute]
    assert sum(kinds) > 0
    found = [read("kvpager_preemptions_total", kind=kind) for kind in ("swap", "recompute")]
    assert found == kinds
    out = engine.stats().pool.total_swapped_out
    assert read("kvpager_swap_bytes_total", tier="host") == out * engine.block_bytes


def test_prometheus_reads_the_tiers_of_an_engine() -> None:
    tier = TierStats("disk", StoreStats(3, 4, 1, hits=5), 0.0, 0.0, bypassed=True)

    class Tiered(ToyEngine):
        def stats(self) -> EngineStats:
            return super().stats()._replace(tiers=TieringStats((tier,), 0, 0, 0, 0))

    with Tiered() as engine:
        read = scrape(EngineMetrics(engine, prefix="mine"))
        assert read("mine_tier_loads_total", tier="disk", outcome="hit") == 5
        assert read("mine_tier_bypassed", tier="disk") == 1


def test_a_server_on_the_loopback_serves_the_metrics() -> None:
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    with ToyEngine() as engine:
        registry.register(EngineMetrics(engine))
        server, thread = prometheus.start_http_server(0, addr="127.0.0.1", registry=registry)
        try:
            url = f"http://127.0.0.1:{server.server_port}/metrics"
            with urllib.request.urlopen(url, timeout=60) as answer:
                text = answer.read().decode()
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
    assert "# TYPE kvpager_steps_total counter" in text
