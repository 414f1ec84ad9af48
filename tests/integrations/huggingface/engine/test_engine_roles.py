"""One engine computes prompts, and another continues them as if it had computed them itself."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("xxhash")

from kvpager import Engine  # noqa: E402
from tests.support.dict_store import DictStore  # noqa: E402
from tests.support.tiered_engines import (  # noqa: E402
    NUM_CACHED,
    ask,
    edited,
    engine_over,
    in_a_process,
    llama,
    prompt,
    without_tiers,
)

SAMPLED = {"do_sample": True, "temperature": 1.5, "seed": 7, "max_new_tokens": 12}


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvpager.integrations.huggingface.engine._SAVE_WAIT_S", 60.0)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture
def shared(model: Any) -> DictStore:
    """A store in memory, which stays usable when an engine closes it."""
    with Engine(model, memory="4MiB") as engine:
        return DictStore(engine.block_bytes)


def both(model: Any, shared: DictStore) -> Any:
    return (
        engine_over(model, shared, role="prefill"),
        engine_over(model, shared, role="decode"),
    )


def test_the_decoding_engine_loads_what_the_other_computed(model: Any, shared: DictStore) -> None:
    one, two = both(model, shared)
    with one as prefill, two as decode:
        for number in range(5):
            tokens = without_tiers(model, number)
            first = ask(prefill, number)
            assert (first.token_ids, first.finish_reason) == (tokens[:1], "length")
            output = ask(decode, number)
            assert output.token_ids == tokens
            assert output.cached_tokens_by_tier == {"dict": NUM_CACHED}


def test_samples_with_a_seed_are_those_of_one_engine(model: Any, shared: DictStore) -> None:
    with Engine(model, memory="4MiB") as engine:
        expected = engine.submit(prompt(), **SAMPLED).result(120).token_ids
    one, two = both(model, shared)
    with one as prefill, two as decode:
        assert prefill.submit(prompt(), **SAMPLED).result(120).token_ids == expected[:1]
        output = decode.submit(prompt(), **SAMPLED).result(120)
    assert (output.token_ids, output.num_cached_tokens) == (expected, NUM_CACHED)


def test_a_prompt_with_its_first_token_is_continued(model: Any, shared: DictStore) -> None:
    tokens = without_tiers(model)
    one, two = both(model, shared)
    with one as prefill, two as decode:
        first = ask(prefill).token_ids
        longer = [*prompt(), *first]
        output = decode.submit(longer, max_new_tokens=7, do_sample=False).result(120)
    assert (first + output.token_ids, output.num_cached_tokens) == (tokens, NUM_CACHED)


def test_several_prompts_are_continued_in_one_batch(model: Any, shared: DictStore) -> None:
    prompts = [prompt(number)[: 20 + 15 * number] for number in range(5)]
    options = {"max_new_tokens": 8, "do_sample": False}
    with Engine(model, memory="4MiB") as engine:
        expected = [output.token_ids for output in engine.generate(prompts, **options)]
    one, two = both(model, shared)
    with one as prefill, two as decode:
        firsts = prefill.generate(prompts, **options)
        outputs = decode.generate(prompts, **options)
    assert [first.token_ids for first in firsts] == [tokens[:1] for tokens in expected]
    assert [output.token_ids for output in outputs] == expected
    assert [output.num_cached_tokens for output in outputs] == [16, 32, 48, 64, 64]


def test_an_empty_store_costs_only_the_prefill(model: Any, shared: DictStore) -> None:
    with engine_over(model, shared, role="decode") as decode:
        output = ask(decode)
    assert (output.token_ids, output.num_cached_tokens) == (without_tiers(model), 0)


def test_a_tenant_or_another_model_loads_nothing(model: Any, shared: DictStore) -> None:
    other = edited()
    with engine_over(model, shared, role="prefill") as prefill:
        ask(prefill, namespace="acme")
    with engine_over(model, shared, role="decode") as decode:
        for namespace, num_cached in (("other", 0), (None, 0), ("acme", NUM_CACHED)):
            output = ask(decode, namespace=namespace)
            assert output.token_ids == without_tiers(model)
            assert output.num_cached_tokens == num_cached
    with engine_over(other, shared, role="decode") as decode:
        output = ask(decode, namespace="acme")
    assert (output.token_ids, output.num_cached_tokens) == (without_tiers(other), 0)


def test_a_prefill_needs_room_for_the_prompt_only(model: Any, shared: DictStore) -> None:
    with engine_over(model, shared, role="prefill", max_model_len=101) as prefill:
        output = prefill.submit(prompt(), max_new_tokens=500, do_sample=False).result(120)
    assert output.token_ids == without_tiers(model)[:1]


def prefill_and_vanish(url: str) -> None:
    """Print the first token of a prompt, and leave without closing anything."""
    with engine_over(llama(), url, role="prefill") as engine:
        print(json.dumps(ask(engine).token_ids), flush=True)
        os._exit(0)


@pytest.mark.slow
def test_a_directory_is_handed_over_to_another_process(model: Any, tmp_path: Path) -> None:
    url, tokens = f"disk:{tmp_path}/kv?capacity=32MiB", without_tiers(model)
    assert in_a_process(f"{__name__}:prefill_and_vanish", url) == tokens[:1]
    with engine_over(model, url, role="decode") as decode:
        output = ask(decode)
    assert (output.token_ids, output.num_cached_tokens) == (tokens, NUM_CACHED)


class PrivateStore(DictStore):
    is_private = True


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("tiers", [(), "host:16MiB", "nixl:/kv", ["host:1MiB", PrivateStore(64)]])
def test_a_role_without_a_shared_tier_is_refused(model: Any, role: Any, tiers: Any) -> None:
    with pytest.raises(ValueError, match=f"role='{role}': no other process reads the tiers"):
        Engine(model, memory="4MiB", tiers=tiers, role=role)


@pytest.mark.parametrize(("role", "error"), [("both", ValueError), (1, TypeError)])
def test_another_role_is_refused(model: Any, role: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"role=.*: expected one of 'prefill', 'decode', or None"):
        Engine(model, memory="4MiB", role=role)
