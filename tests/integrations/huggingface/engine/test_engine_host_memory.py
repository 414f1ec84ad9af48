"""Swapped requests and cached blocks in one host memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("xxhash")

from kvpager import Engine  # noqa: E402
from kvpager.scheduling.preemption import PreemptionCosts  # noqa: E402
from kvpager.storage.tiers.host import HostStore  # noqa: E402
from tests.support.engines import assert_nothing_is_held  # noqa: E402
from tests.support.tiered_engines import (  # noqa: E402
    ask,
    engine_over,
    llama,
    prompt,
    tiering_of,
    without_tiers,
)

_SWAPS = PreemptionCosts(seconds_per_token=100.0, seconds_per_block=1e-6)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def check_slots(engine: Engine) -> None:
    """Each host block is lent or held by a swapped request, and none is on its way."""
    tiering = tiering_of(engine)
    tiering._manager.host.lend()
    store = tiering._staging.store
    assert store is not None
    store._tier.check()
    assert store.capacity == tiering._manager.host.num_lent
    assert tiering._manager.stats().num_host_free == len(store.memory)


def test_host_memory_is_the_first_tier(model: Any, tmp_path: Path) -> None:
    disk = f"disk:{tmp_path}/kv?capacity=32MiB"
    for tiers in ("host", ["host"], [disk], ["host", disk]):
        with engine_over(model, tiers, memory="80KiB", host_memory="1MiB") as engine:
            assert [tier.name for tier in engine.stats().tiers.tiers] == (
                ["host", "disk"] if disk in tiers else ["host"]
            )
            for number in range(3):  # the device has room for 10 blocks
                ask(engine, number)
            output = ask(engine)
            assert output.cached_tokens_by_tier == {"host": output.num_cached_tokens}
            assert output.num_cached_tokens > 0
            assert output.token_ids == without_tiers(model)
            assert tiering_of(engine)._manager.num_host_blocks == 1024 * 1024 // engine.block_bytes


def test_a_hit_and_a_save_copy_each_block_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a block was copied between host and host")

    monkeypatch.setattr(HostStore, "load", refuse)
    monkeypatch.setattr(HostStore, "save", refuse)
    with engine_over(model, "host", memory="80KiB", host_memory="1MiB") as engine:
        staging, copied = tiering_of(engine)._staging, {"read": 0, "write": 0}

        def count(name: str, copy: Any) -> None:
            def counted(one: Any, other: Any) -> None:
                copied[name] += len(one)
                copy(one, other)

            monkeypatch.setattr(staging, name, counted)

        count("read", staging.read)
        count("write", staging.write)
        for number in range(3):
            ask(engine, number)
        output = ask(engine)
    assert staging.store is not None
    stats = staging.store.stats()  # all saves have ended
    assert copied["read"] == stats.saved + stats.known > 0
    assert copied["write"] == output.num_cached_tokens // 16 == stats.hits > 0


def test_swapped_requests_and_cached_blocks_share_a_tight_host_memory(model: Any) -> None:
    settings = {"max_new_tokens": 60, "do_sample": False}
    prompts = [prompt(number) for number in range(6)]
    with Engine(model, memory="4MiB") as engine:
        expected = [output.token_ids for output in engine.generate(prompts, **settings)]
    options = {"memory": "200KiB", "host_memory": "200KiB", "costs": _SWAPS}
    with engine_over(model, "host", **options) as engine:
        for chosen in ([0, 1, 2, 3], [4, 5], [0, 1, 2, 3]):
            outputs = engine.generate([prompts[number] for number in chosen], **settings)
            assert [output.token_ids for output in outputs] == [expected[n] for n in chosen]
        stats = engine.stats()
        [tier] = stats.tiers.tiers
        assert stats.scheduler.total_preempted_by_swap > 0
        assert tier.store.hits > 0
        assert_nothing_is_held(engine)
        check_slots(engine)
