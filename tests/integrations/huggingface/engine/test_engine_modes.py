"""`Engine(mode=)`: the same tokens from blocks, from mapped rows and from reserved regions."""

from __future__ import annotations

from typing import Any

import pytest

from kvpager.errors import KVPagerError
from kvpager.integrations.huggingface.engine import Engine
from kvpager.modes import page_pool
from tests.support import tiny_models
from tests.support.engines import alone, assert_nothing_is_held, batched, some_prompts

MODES: dict[str, dict[str, Any]] = {
    "paged": {},
    "virtual": {"mode": "virtual", "memory": "32MiB"},
    "reserved": {"mode": "reserved", "max_model_len": 128, "memory": "32MiB"},
}
OTHER_MODES = [
    pytest.param(
        "virtual",
        marks=pytest.mark.skipif(not hasattr(page_pool.os, "memfd_create"), reason="needs Linux"),
    ),
    "reserved",
]

pytestmark = pytest.mark.filterwarnings("ignore")


def made(name: str) -> Any:
    if not tiny_models.is_known(name):
        pytest.skip("not in this transformers")
    return tiny_models.tiny_model(name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", OTHER_MODES)
@pytest.mark.parametrize("name", [*tiny_models.DECODERS, *tiny_models.ENCODER_DECODERS])
def test_every_mode_writes_the_tokens_of_generate(name: str, mode: str) -> None:
    model = made(name)
    prompts = [*some_prompts(model), *some_prompts(model, count=2)]
    expected = [alone(model, prompt) for prompt in prompts]
    with Engine(model, max_batch_tokens=24, block_size=4, **MODES[mode]) as engine:
        for _ in range(2):  # the second time from cached prompts
            outputs = engine.generate(prompts, max_new_tokens=16, do_sample=False)
            assert [output.token_ids for output in outputs] == expected
        assert_nothing_is_held(engine)
        hits = engine.stats().pool.prefix_hit_tokens
        assert (hits > 0) == engine._core.scheduler.prefix_cache


@pytest.mark.slow
@pytest.mark.parametrize("mode", OTHER_MODES)
@pytest.mark.parametrize("name", [*tiny_models.DECODERS, *tiny_models.ENCODER_DECODERS])
def test_every_mode_draws_the_same_samples(name: str, mode: str) -> None:
    model = made(name)
    prompts = some_prompts(model, count=3)
    settings: dict[str, Any] = {"do_sample": True, "temperature": 0.9}
    if name != "qwen3_next":  # its samples cannot share a state
        settings["num_return_sequences"] = 3
    drawn = []
    for options in (MODES["paged"], MODES[mode]):
        with Engine(model, block_size=4, **options) as engine:
            streams = [
                engine.submit(each, seed=3, max_new_tokens=9, **settings) for each in prompts
            ]
            drawn.append([stream.result().samples for stream in streams])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("mode", OTHER_MODES)
def test_a_model_with_attention_of_its_own_gathers_nothing(mode: str) -> None:
    model = made("bloom")
    prompts = some_prompts(model, count=3)
    expected = [alone(model, prompt) for prompt in prompts]
    with Engine(model, block_size=4, **MODES[mode]) as engine:
        outputs = engine.generate(prompts, max_new_tokens=16, do_sample=False)
        assert [output.token_ids for output in outputs] == expected
        counters = engine._budget.counters
        assert engine.is_packed is False
    assert (counters.gathers, counters.in_place_reads > 0) == (2 * 2 * 2, True)


def test_a_row_of_addresses_follows_its_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """So each block is mapped once, although the sequences take turns in every step."""
    mapped = []
    real = page_pool.PagePool.map

    def spy(self: page_pool.PagePool, address: int, page: int, count: int = 1) -> None:
        mapped.extend(range(page, page + count))
        real(self, address, page, count)

    monkeypatch.setattr(page_pool.PagePool, "map", spy)
    model = made("bloom")
    prompts = [list(range(5, 5 + length)) for length in (30, 17, 9)]
    batched(model, prompts, mode="virtual", block_size=4, prefix_cache=False)
    # Of 16 new tokens, 15 are written. Rows begin with 64 slots. A request of one token follows.
    assert len(mapped) == sum(-(-(len(prompt) + 15) // 4) for prompt in prompts) + 1


@pytest.mark.parametrize("forward", ["packed", "per_sequence"])
def test_requests_wait_for_a_free_region(forward: Any) -> None:
    model = made("llama")
    prompts = some_prompts(model, count=5)
    expected = [alone(model, prompt) for prompt in prompts]
    with Engine(
        model, mode="reserved", max_model_len=64, max_num_seqs=2, forward=forward
    ) as engine:
        outputs = engine.generate(prompts, max_new_tokens=16, do_sample=False)
        stats = engine.stats().pool
        assert stats.num_blocks == 2 * 4
    assert [output.token_ids for output in outputs] == expected


def test_samples_of_a_request_have_a_region_each() -> None:
    model = made("llama")
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 9}
    drawn = []
    for mode in ("paged", "reserved"):
        with Engine(model, mode=mode, max_model_len=64, max_num_seqs=3) as engine:
            output = engine.submit(range(5, 25), seed=7, **settings).result()
            drawn.append(output.samples)
            copied = engine.stats().pool.total_copied
    assert drawn[0] == drawn[1]
    assert copied == 2 * 2  # two of three samples, two blocks each


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "flat"}, "mode='flat': expected one of"),
        (
            {"mode": "reserved", "host_memory": "1MiB"},
            'host_memory: mode="reserved" does not support it',
        ),
        (
            {"mode": "reserved", "eviction": "lifetime"},
            'eviction: mode="reserved" does not support it',
        ),
        ({"mode": "reserved", "memory": "8KiB"}, "memory='8KiB': a region of max_model_len="),
    ],
)
def test_what_a_mode_cannot_do_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, KVPagerError), match=message):
        Engine(made("llama"), **settings)


def test_a_region_needs_a_longest_length() -> None:
    with pytest.raises(ValueError, match="Set max_model_len to reserve regions"):
        Engine(made("bloom"), mode="reserved")
