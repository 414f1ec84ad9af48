"""`Engine(kv_events=...)`: routers learn which prompts a model's engine has cached."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvpager import Engine
from kvpager.engine.config import EngineConfig
from kvpager.kv_events.settings import KVEvents
from tests.support.tiny_models import tiny_model

LOCAL = "tcp://127.0.0.1:0"
PROMPT = list(range(3, 51))


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture
def router_of() -> Any:
    pytest.importorskip("msgspec")
    pytest.importorskip("zmq")
    from tests.support.kv_router import Router

    return Router


def test_a_router_knows_the_prompts_of_an_engine(llama: Any, router_of: Any) -> None:
    events = KVEvents(LOCAL, replay_endpoint=LOCAL)
    with (
        Engine(llama, memory="8MiB", kv_events=events) as engine,
        router_of(engine.kv_events) as router,
    ):
        engine.generate([PROMPT], max_new_tokens=4)
        engine.generate([PROMPT[:40]], max_new_tokens=4, namespace="acme")
        router.catch_up()
        assert len(router.index) == 3 + 2
        (salted,) = (each for each in router.messages if ["acme"] in each.get("extra_keys", ()))
        assert salted["token_ids"] == PROMPT[:32]


def test_an_address_is_enough(llama: Any, router_of: Any) -> None:
    with Engine(llama, memory="8MiB", kv_events=LOCAL) as engine:
        assert engine.kv_events.endpoint.startswith("tcp://127.0.0.1:")
        assert engine.kv_events.replay_endpoint is None


def test_an_address_in_use_leaves_nothing_behind(llama: Any, router_of: Any) -> None:
    with Engine(llama, memory="8MiB", kv_events=LOCAL) as engine:
        threads = threading.active_count()
        with pytest.raises(OSError, match="Choose another address"):
            Engine(llama, memory="8MiB", kv_events=engine.kv_events.endpoint)
        assert threading.active_count() == threads


def test_a_router_knows_the_windows_of_a_model(router_of: Any) -> None:
    model = tiny_model("gemma3")
    events = KVEvents(LOCAL, replay_endpoint=LOCAL)
    with (
        Engine(model, memory="8MiB", kv_events=events) as engine,
        router_of(engine.kv_events) as router,
    ):
        engine.generate([PROMPT], max_new_tokens=4)
        router.catch_up()
        stored = [each for each in router.messages if each["type"] == "BlockStored"]
        kinds = {each["group_idx"]: each["kv_cache_spec_kind"] for each in stored}
        assert set(kinds.values()) == {"full_attention", "sliding_window"}
        assert {each.get("kv_cache_spec_sliding_window") for each in stored} > {None}
        tokens: dict[int, list[int]] = {group: [] for group in kinds}
        for each in stored:
            tokens[each["group_idx"]] += each["token_ids"]
        assert list(tokens.values()) == [PROMPT] * len(kinds)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("tcp://*:5557", "other machines could read"),
        ("tcp://10.1.2.3:5557", "other machines could read"),
        ("tcp://[::]:5557", "other machines could read"),
        ("tcp://127.0.0.1", "expected"),
        ("tcp://127.0.0.1:70000", "expected"),
        ("inproc://x", "expected"),
        ("ipc://", "expected"),
    ],
)
def test_a_bad_address_is_refused(settings: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(kv_events=settings)


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:1", "tcp://localhost:1", "tcp://[::1]:1", "ipc:///path"]
)
def test_addresses_of_this_machine_are_taken(address: str) -> None:
    assert KVEvents(address, replay_endpoint=address).endpoint == address


def test_other_machines_are_asked_for() -> None:
    assert KVEvents("tcp://*:5557", any_host=True).any_host


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"block_hashes": "builtin"}, ValueError),
        ({"block_hashes": None}, TypeError),
        ({"encoding": "json"}, ValueError),
        ({"int_hashes": "no"}, TypeError),
        ({"topic": b"kv"}, TypeError),
        ({"rank": -1}, ValueError),
        ({"interval_s": 0}, ValueError),
        ({"queue_size": 0}, ValueError),
        ({"num_events": 0}, ValueError),
        ({"replay_memory": "much"}, ValueError),
        ({"replay_memory": None}, TypeError),
        ({"replay_endpoint": "tcp://*:1"}, ValueError),
        ({"replay_endpoint": 5558}, TypeError),
    ],
)
def test_a_bad_setting_is_refused(settings: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(settings))):
        KVEvents(LOCAL, **settings)


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(TypeError, match="kv_events=5557"):
        EngineConfig(kv_events=5557)  # type: ignore[arg-type]


def test_an_engine_that_shares_no_prompts_has_none_to_report() -> None:
    with pytest.raises(ValueError, match="prefix_cache=False"):
        EngineConfig(kv_events=LOCAL, prefix_cache=False)
