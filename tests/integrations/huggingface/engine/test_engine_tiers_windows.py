"""Models with windows find prompts in tiers, and save what a window needs."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("xxhash")

from kvpager import Engine
from kvpager.errors import RequestCancelled
from tests.conformance.architectures import WINDOW
from tests.support.dict_store import DictStore
from tests.support.engines import alone, assert_nothing_is_held
from tests.support.tiered_engines import (
    ask,
    engine_over,
    prompt,
    store_stats,
    tiering_of,
    without_tiers,
)
from tests.support.tiny_models import is_known, tiny_model

MODELS = ["mistral", "gemma3", "gpt_oss", "llama4"]
BLOCK, NUM_TOKENS, REPLY = 4, 100, 8
NUM_CACHED = (NUM_TOKENS - 1) // BLOCK * BLOCK
OPTIONS: dict[str, Any] = {"block_size": BLOCK, "max_batch_tokens": 32}

pytestmark = [
    pytest.mark.skipif(not is_known("llama4"), reason="needs a later transformers"),
    pytest.mark.filterwarnings("ignore:.*RoPE scaling factor.*"),
]


@pytest.fixture
def disk(tmp_path: Path) -> str:
    return f"disk:{tmp_path}/kv?capacity=64MiB&admit=always"


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("name", MODELS)
def test_a_new_engine_finds_a_prompt_with_windows_on_disk(name: str, disk: str) -> None:
    tokens = without_tiers(tiny_model(name), **OPTIONS)
    with engine_over(tiny_model(name), disk, **OPTIONS) as engine:
        assert ask(engine).num_cached_tokens == 0
        assert ask(engine, namespace="acme").num_cached_tokens == 0
    with engine_over(tiny_model(name), disk, **OPTIONS) as engine:
        output = ask(engine)
        assert (output.token_ids, output.num_cached_tokens) == (tokens, NUM_CACHED)
        assert output.cached_tokens_by_tier == {"disk": NUM_CACHED}
        assert ask(engine, namespace="other").num_cached_tokens == 0
        assert ask(engine, namespace="acme").cached_tokens_by_tier == {"disk": NUM_CACHED}
        assert_nothing_is_held(engine)


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("name", MODELS)
def test_an_evicted_prompt_with_windows_is_found_on_the_host(name: str) -> None:
    model = tiny_model(name)
    with engine_over(model, "host:16MiB", **OPTIONS) as probe:
        num_blocks = tiering_of(probe)._manager.queries.blocks_for(NUM_TOKENS + REPLY)
        memory = 2 * num_blocks * probe.block_bytes
    with engine_over(model, "host:16MiB", **OPTIONS, memory=memory) as engine:
        for number in range(5):
            ask(engine, number)
        outputs = [ask(engine, number) for number in range(5)]
        assert_nothing_is_held(engine)
    assert [each.token_ids for each in outputs] == [
        without_tiers(model, number, **OPTIONS) for number in range(5)
    ]
    assert sum(each.cached_tokens_by_tier.get("host", 0) for each in outputs) > 0


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_a_prompt_saves_no_more_than_its_windows_need(name: str, disk: str) -> None:
    with engine_over(tiny_model(name), disk, **OPTIONS) as engine:
        windows = tiering_of(engine)._manager.windows
        for number in range(2):
            ask(engine, number)
    with engine_over(tiny_model(name), disk, **OPTIONS) as engine:
        saved = store_stats(engine).num_blocks
    num_full = (NUM_TOKENS + REPLY - 1) // BLOCK
    # The blocks in the window at the end of the prompt, and at the end of the reply.
    most = [num_full if window is None else 2 * (window // BLOCK + 1) for window in windows]
    assert WINDOW in windows
    assert saved is not None
    assert sum(of for of in most if of == num_full) * 2 <= saved <= 2 * sum(most)


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("name", ["gemma3", "mistral"])
@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8_e4m3"])
def test_quantised_blocks_with_windows_are_stored_as_they_are(
    name: str, kv_cache_dtype: str, disk: str
) -> None:
    options = OPTIONS | {"kv_cache_dtype": kv_cache_dtype}
    for num_cached in (0, NUM_CACHED):
        with engine_over(tiny_model(name), disk, **options) as engine:
            output = ask(engine)
        assert output.num_cached_tokens == num_cached
    assert output.token_ids == without_tiers(tiny_model(name), **options)


def test_a_chat_continues_after_the_reply(disk: str) -> None:
    model = tiny_model("gemma3")
    with engine_over(model, disk, **OPTIONS) as engine:
        first = ask(engine)
    turn = [*prompt(), *first.token_ids, *range(5, 20)]
    with engine_over(model, disk, **OPTIONS) as engine:
        output = engine.submit(turn, max_new_tokens=6, do_sample=False).result(120)
    assert output.num_cached_tokens == (NUM_TOKENS + REPLY - 1) // BLOCK * BLOCK
    assert output.token_ids == alone(model, turn, max_new_tokens=6)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_prompts_that_share_a_fetch_find_their_own_windows(name: str, disk: str) -> None:
    model, front = tiny_model(name), prompt()[:60]
    prompts = [[*front, *prompt(number)[:40]] for number in (1, 2, 3)]
    with engine_over(model, disk, **OPTIONS) as engine:
        for each in prompts:
            engine.submit(each, max_new_tokens=1, do_sample=False).result(120)
    with engine_over(model, disk, **OPTIONS) as engine:
        [store], may_load = tiering_of(engine).stores, threading.Event()
        load = store.load
        store.load = lambda *arguments: (may_load.wait(60), load(*arguments))[1]
        streams = [engine.submit(each, max_new_tokens=6, do_sample=False) for each in prompts]
        may_load.set()
        outputs = [stream.result(120) for stream in streams]
        assert_nothing_is_held(engine)
    assert [output.num_cached_tokens for output in outputs[:2]] == [NUM_CACHED] * 2
    assert [output.token_ids for output in outputs] == [
        alone(model, each, max_new_tokens=6) for each in prompts
    ]


def test_a_windowed_block_that_leaves_meanwhile_is_computed(disk: str) -> None:
    model = tiny_model("mistral")
    with engine_over(model, disk, **OPTIONS) as engine:
        ask(engine)
    with engine_over(model, disk, **OPTIONS) as engine:
        [store] = tiering_of(engine).stores
        load = store.load
        store.load = lambda keys, into, deadline: (store.drop(keys), load(keys, into, deadline))[1]
        output = ask(engine)
    assert (output.token_ids, output.num_cached_tokens) == (without_tiers(model, **OPTIONS), 0)


def test_a_prompt_with_windows_is_decoded_by_another_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvpager.integrations.huggingface.engine._SAVE_WAIT_S", 60.0)
    model = tiny_model("gpt_oss")
    with Engine(model, memory="4MiB", **OPTIONS) as engine:
        shared = DictStore(engine.block_bytes)
    with engine_over(model, shared, **OPTIONS, role="prefill") as prefill:
        [token] = ask(prefill).token_ids
    assert len(shared.blocks) <= NUM_TOKENS // BLOCK + WINDOW // BLOCK + 1
    with engine_over(model, shared, **OPTIONS, role="decode") as decode:
        output = ask(decode)
    assert output.token_ids == without_tiers(model, **OPTIONS)
    assert output.token_ids[0] == token
    assert output.num_cached_tokens == NUM_CACHED


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", MODELS)
def test_traffic_with_windows_gives_the_same_tokens(name: str, seed: int, tmp_path: Path) -> None:
    model, chance = tiny_model(name), random.Random(seed)
    fronts = [[chance.randrange(3, 60) for _ in range(60)] for _ in range(4)]
    num_fetched = 0
    for _ in range(5):
        options: dict[str, Any] = {
            "memory": chance.choice(["256KiB", "1MiB"]),
            "host_memory": chance.choice([None, "1MiB"]),
            "max_batch_tokens": chance.choice([8, 64]),
            "block_size": BLOCK,
        }
        disk = f"disk:{tmp_path}/kv?capacity=8MiB&admit=always"
        tiers = chance.choice([["host:512KiB", disk], [disk]])
        with engine_over(model, tiers, **options) as engine:
            prompts = [
                [*chance.choice(fronts)[: chance.randrange(9, 61)], chance.randrange(3, 60)]
                for _ in range(16)
            ]
            streams = [engine.submit(each, max_new_tokens=6, do_sample=False) for each in prompts]
            for stream in chance.sample(streams, 3):
                stream.cancel()
            for tokens, stream in zip(prompts, streams, strict=True):
                try:
                    output = stream.result(120)
                except RequestCancelled:
                    continue
                assert output.token_ids == alone(model, tokens, max_new_tokens=6)
                num_fetched += sum(output.cached_tokens_by_tier.values())
            assert_nothing_is_held(engine)
    assert num_fetched > 0
