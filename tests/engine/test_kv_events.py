"""An engine publishes which prompts it has cached."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from kvpager import KVPagerError
from kvpager.kv_events.settings import KVEvents
from kvpager.scheduling.request import lora_of_version, split_lora
from kvpager.storage.keys import KeyContext, content_keys
from tests.support.toy_runner import BLOCK_SIZE, ToyEngine
from tests.support.toy_tiers import TieredEngine, Watch, store

pytest.importorskip("msgspec")
pytest.importorskip("zmq")
from tests.support.kv_router import Router

LOCAL = "tcp://127.0.0.1:0"
PROMPT = list(range(40))


def engine(made: Any = ToyEngine, *, watch: Any = None, **options: Any) -> Any:
    settings = KVEvents(LOCAL, replay_endpoint=LOCAL, int_hashes=False)
    core = {"kv_events": settings, "watch": watch}
    return made(num_events=1000, core=core, **options)


def stored(router: Router) -> list[Any]:
    return [each for each in router.messages if each["type"] == "BlockStored"]


def test_a_router_learns_of_a_prompt_and_its_reply() -> None:
    with engine() as core, Router(core.kv_events) as router:
        output = core.ask(PROMPT, 9).result()
        router.catch_up()
        tokens = [token for message in stored(router) for token in message["token_ids"]]
        assert tokens == [*PROMPT, *output.token_ids][: len(tokens)]
        assert len(tokens) == 48
        assert len(router.index) == len(tokens) // BLOCK_SIZE


def test_cleared_prompts_are_forgotten() -> None:
    with engine() as core, Router(core.kv_events) as router:
        core.ask(PROMPT, 2).result()
        router.catch_up()
        assert router.index
        core.clear_prefix_cache()
        router.catch_up()
        assert router.index == {}


def test_blocks_of_an_earlier_model_are_forgotten_at_the_next_prompt() -> None:
    watch = Watch()
    with engine(watch=watch) as core, Router(core.kv_events) as router:
        held = core.ask(PROMPT, 200)
        core.ask(PROMPT, 2).result()
        router.catch_up()
        before = set(router.index)
        watch.version = 1
        core.ask([7] * 8, 1).result()
        router.catch_up()
        assert before
        assert len(router.index) == 2
        assert {message["lora_name"] for message in stored(router)} == {None}
        held.cancel()


def test_with_tiers_a_block_has_its_key_in_the_stores() -> None:
    with (
        engine(lambda **options: TieredEngine([store()], **options)) as core,
        Router(core.kv_events) as router,
    ):
        core.ask(PROMPT, 1).result()
        router.catch_up()
        assert [name for _, name in router.index] == content_keys(
            PROMPT, BLOCK_SIZE, KeyContext("toy", "toy")
        )


def test_an_engine_without_shared_prompts_is_refused() -> None:
    before = threading.active_count()
    with pytest.raises(KVPagerError, match="shares no prefixes"):
        engine(prefix_cache=False)
    assert threading.active_count() == before


def test_a_closed_engine_publishes_no_more() -> None:
    core = engine()
    core.close()
    assert not core.kv_events._thread.is_alive()


@pytest.mark.parametrize("name", [None, "x", "x\0", "\0", "x\x005", "\x003"])
@pytest.mark.parametrize("version", [0, 1, 12])
def test_the_version_of_a_cache_is_split_from_the_adapter(name: Any, version: int) -> None:
    assert split_lora(lora_of_version(name, version)) == (name, version)
