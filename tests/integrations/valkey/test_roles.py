"""A process computes prompts and may die; engines elsewhere continue them through a server."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

pytest.importorskip("transformers")

from kvpager.integrations.huggingface import engine as engines
from kvpager.integrations.valkey import ValkeyStore
from tests.support.tiered_engines import (
    NUM_CACHED,
    ask,
    engine_over,
    in_a_process,
    llama,
    without_tiers,
)
from tests.support.valkey_servers import Server

NUM_PROMPTS = 3


def over(server: Server) -> str:
    return f"{server.url}?timeout_s=60"  # for a machine under load


def answer_and_die(url: str) -> None:
    """Print the first tokens of prompts, and die at the last answer."""
    engines._SAVE_WAIT_S = 60.0
    with engine_over(llama(), url, role="prefill") as engine:
        firsts = [ask(engine, number).token_ids for number in range(NUM_PROMPTS)]
        print(json.dumps(firsts), flush=True)
        os._exit(0)


def die_while_saving(url: str) -> None:
    """Die when three blocks of the prompt are on the server."""
    save = ValkeyStore.save

    def save_three(self: Any, keys: Any, blocks: Any, deadline: float) -> None:
        save(self, keys[:3], blocks[:3], deadline)
        print("null", flush=True)
        os._exit(0)

    ValkeyStore.save = save_three  # type: ignore[method-assign,assignment]
    with engine_over(llama(), url, role="prefill") as engine:
        ask(engine)


@pytest.mark.slow
def test_prompts_of_a_process_that_died_are_continued(server: Server) -> None:
    model = llama()
    tokens = [without_tiers(model, number) for number in range(NUM_PROMPTS)]
    with engine_over(model, over(server), role="decode") as decode:
        firsts = in_a_process(f"{__name__}:answer_and_die", over(server))
        assert firsts == [each[:1] for each in tokens]
        for number in range(NUM_PROMPTS):
            assert ask(decode, number, namespace="other").num_cached_tokens == 0
            output = ask(decode, number)
            assert (output.token_ids, output.num_cached_tokens) == (tokens[number], NUM_CACHED)


@pytest.mark.slow
def test_a_process_that_dies_while_it_saves_changes_no_token(server: Server) -> None:
    model = llama()
    with engine_over(model, over(server), role="decode") as decode:
        assert in_a_process(f"{__name__}:die_while_saving", over(server)) is None
        output = ask(decode)
    assert (output.token_ids, output.num_cached_tokens) == (without_tiers(model), 48)


def test_a_server_that_was_emptied_is_filled_by_the_next_prefill(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "_SAVE_WAIT_S", 60.0)
    model = llama()
    with (
        engine_over(model, over(server), role="prefill") as prefill,
        engine_over(model, over(server), role="decode") as decode,
    ):
        ask(prefill)
        server.ask(b"FLUSHALL")
        ask(prefill)
        output = ask(decode)
    assert (output.token_ids, output.num_cached_tokens) == (without_tiers(model), NUM_CACHED)


def test_a_server_that_is_gone_delays_no_answer_for_ever(own_server: Server) -> None:
    model = llama()
    tokens = without_tiers(model)
    with (
        engine_over(model, own_server.url, role="prefill") as prefill,
        engine_over(model, own_server.url, role="decode") as decode,
    ):
        own_server.stop()
        assert ask(prefill).token_ids == tokens[:1]
        assert ask(decode).token_ids == tokens
