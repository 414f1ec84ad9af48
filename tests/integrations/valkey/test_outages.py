"""A server that stops, dies or is slow under an engine costs deadlines, and no token."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvpager.integrations.valkey import ValkeyStore
from kvpager.storage.tiers.layout import BlockLayout
from tests.support.clock import Clock
from tests.support.links import Link
from tests.support.toy_runner import expected
from tests.support.toy_tiers import BLOCK_BYTES, PROMPT, TieredEngine
from tests.support.valkey_servers import Server, valkey

PROMPTS = [[seed, *PROMPT] for seed in range(8)]


def store_at(url: str, block_bytes: int = BLOCK_BYTES, **options: Any) -> ValkeyStore:
    layout = BlockLayout("toy", block_bytes)
    return ValkeyStore(url, layout, **{"timeout_s": 60.0} | options)


def fill(server: Server, block_bytes: int = BLOCK_BYTES) -> None:
    """Save the prompts as another process would."""
    store = store_at(server.url, block_bytes)
    with TieredEngine([store], 256, block_bytes=block_bytes, max_wait_s=60) as engine:
        for prompt in PROMPTS:
            engine.ask(prompt).result(60)
        engine.saved()


def check(engine: TieredEngine, prompts: list[list[int]]) -> int:
    """Ask prompts, and compare the tokens. Return how many were found in the store."""
    count = 0
    for prompt in prompts:
        output = engine.ask(prompt).result(60)
        assert output.token_ids == expected(prompt, 8)
        count += output.cached_tokens_by_tier.get("valkey", 0)
    return count


def calls_of(store: ValkeyStore, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that gets the deadline of each call that reaches for the server."""
    calls, wire = list[float](), store._pool.wire

    def counted(deadline: float) -> Any:
        calls.append(deadline)
        return wire(deadline)

    monkeypatch.setattr(store._pool, "wire", counted)
    return calls


OUTAGES: dict[str, Callable[[Server], None]] = {"stopped": Server.freeze, "killed": Server.stop}


@pytest.mark.parametrize("outage", ["stopped", pytest.param("killed", marks=pytest.mark.slow)])
def test_a_server_that_is_away_is_left_alone(
    own_server: Server, outage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fill(own_server)
    clock = Clock()
    away = store_at(own_server.url, clock=clock, timeout_s=0.05)
    calls = calls_of(away, monkeypatch)
    with ExitStack() as successors, TieredEngine([away], 16, max_wait_s=0.05) as engine:
        OUTAGES[outage](own_server)
        for prompt in PROMPTS * 4:
            check(engine, [prompt])
            engine.saved()
            if away.bypassed:
                break
        assert away.bypassed
        before = len(calls)
        check(engine, PROMPTS)
        engine.saved()
        assert len(calls) == before  # not even one
        clock.now += 1.0
        check(engine, PROMPTS)
        engine.saved()
        assert len(calls) == before + 1  # the probe
        if outage == "stopped":
            own_server.thaw()
        else:
            successors.callback(valkey(tmp_path, port=own_server.port).stop)
        for _ in range(50):  # probes that a busy machine makes late
            clock.now += 60.0
            check(engine, PROMPTS)
            engine.saved()
            if not away.bypassed:
                break
        assert not away.bypassed
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.slow
def test_a_request_waits_for_its_deadline_not_for_the_server(own_server: Server) -> None:
    fill(own_server)
    patient = store_at(own_server.url, timeout_s=3600)
    with TieredEngine([patient], 256, max_wait_s=0.1) as engine:
        own_server.freeze()
        other = engine.ask([7] * 10, 100)
        assert check(engine, PROMPTS) == 0
        assert other.result(60).token_ids == expected([7] * 10, 100)
        own_server.thaw()


@pytest.mark.slow
def test_a_slow_server_serves_what_arrives_and_is_then_left_out(own_server: Server) -> None:
    fill(own_server)
    link = Link(own_server)
    try:
        slow = store_at(link.url)
        with TieredEngine([slow], 256, max_wait_s=60, recompute_s=lambda num_blocks: 2.0) as engine:
            link.rate = 300  # bytes a second: a prompt takes 5 s, and may take 1 s
            found = check(engine, PROMPTS)
            tiers = engine.stats().tiers
            assert tiers is not None
            assert found < 36 * len(PROMPTS)
            assert tiers.total_declined >= len(PROMPTS) - 2
            link.rate = None
    finally:
        link.close()


class Deadlines:
    """Records how long each fetch of an engine may hold its request, in seconds."""

    def __init__(self, engine: TieredEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        assert engine._fetching is not None
        tiering = engine._fetching._tiering
        self.waits, begin = list[float](), tiering.begin

        def recorded(*prompt: Any, **options: Any) -> Any:
            fetch = begin(*prompt, **options)
            if fetch is not None:
                self.waits.append(fetch.wait_until - time.monotonic())
            return fetch

        monkeypatch.setattr(tiering, "begin", recorded)


@pytest.mark.slow
@pytest.mark.parametrize("block_kib", [256, 2048])
def test_a_server_of_5_megabytes_a_second_costs_a_request_one_deadline_at_most(
    own_server: Server, block_kib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    block_bytes = block_kib << 10
    fill(own_server, block_bytes)
    link = Link(own_server)
    recompute_s = 0.1 * block_kib / 256  # a prompt of 10 blocks arrives in five times as long
    try:
        slow = store_at(link.url, block_bytes)
        with TieredEngine(
            [slow], 256, block_bytes=block_bytes, recompute_s=lambda _: recompute_s
        ) as engine:
            link.rate = link.request_rate = 5_000_000
            deadlines = Deadlines(engine, monkeypatch)
            other = engine.ask([7] * 10, 200)
            found = check(engine, PROMPTS)  # one after the other
            assert other.result(60).token_ids == expected([7] * 10, 200)
            tiers = engine.stats().tiers
            assert tiers is not None
            assert found < 36 * len(PROMPTS)
            assert tiers.total_declined >= len(PROMPTS) - 2  # these were computed at once
            assert len(deadlines.waits) + tiers.total_declined == len(PROMPTS) + 1
            # A fetch that began holds its request for half of the time of computing it, at most.
            assert all(wait_s <= recompute_s / 2 for wait_s in deadlines.waits)
            assert tiers.num_fetching == 0
            link.rate = link.request_rate = None
    finally:
        link.close()
