"""Engines of several processes share prompts through a server, and never a wrong byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tests.support.tiered_engines import (
    NUM_CACHED,
    OTHERS,
    ask,
    engine_over,
    evict_found_blocks,
    in_a_process,
    keys_of,
    llama,
    store_stats,
    without_tiers,
)
from tests.support.valkey_blocks import FRAME_AT
from tests.support.valkey_servers import Server, valkey

# The prompts, by what happens to their third block.
HIT, FLIPPED, LOST, SHORT, EVICTED = range(5)


def over(server: Server) -> str:
    return f"{server.url}?timeout_s=60"  # for a machine under load


def save(url: str) -> list[list[int]]:
    """Save all prompts of no namespace; return their tokens."""
    with engine_over(llama(), url) as engine:
        return [ask(engine, number).token_ids for number in range(5)]


def damage(server: Server) -> None:
    """Damage the third block of some prompts."""
    with engine_over(llama(), over(server)) as engine:
        names = [[b"kvp1:" + key for key in keys_of(engine, number)] for number in range(5)]
    assert {name for of_prompt in names for name in of_prompt} <= set(server.names())
    server.ask(b"SETRANGE", names[FLIPPED][2], b"%d" % (FRAME_AT + 4000), b"x")
    server.ask(b"DEL", names[LOST][2])
    server.ask(b"SET", names[SHORT][2], b"short")


def read(url: str) -> dict[str, Any]:
    """Return tokens and cached tokens of each prompt, of a tenant, of other models and layouts."""
    model, found = llama(), dict[str, Any]()
    with engine_over(model, url) as engine:
        for number in (HIT, FLIPPED, LOST, SHORT):
            found[str(number)] = told(ask(engine, number))
        found["tenant"] = told(ask(engine, namespace="other"))
        evict_found_blocks(engine, EVICTED, first=2)
        found[str(EVICTED)] = told(ask(engine, EVICTED))
        assert store_stats(engine).bad == 2
    for name, (make, options) in OTHERS.items():
        other = make()
        with engine_over(other, url, **options) as engine:
            output = ask(engine)
        same = output.token_ids == without_tiers(other, **options)
        found[name] = same, output.num_cached_tokens
    return found


def told(output: Any) -> tuple[list[int], int]:
    return output.token_ids, output.num_cached_tokens


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of PEFT's
def test_another_process_gets_the_same_tokens_whatever_became_of_the_blocks(
    server: Server,
) -> None:
    model, url = llama(), over(server)
    tokens = [without_tiers(model, number) for number in range(5)]
    assert in_a_process(f"{__name__}:save", url) == tokens
    damage(server)
    found = in_a_process(f"{__name__}:read", url)
    assert found.pop("tenant") == [tokens[HIT], 0]
    for name in OTHERS:
        assert found.pop(name) == [True, 0], name
    cached = dict.fromkeys(range(5), 32) | {HIT: NUM_CACHED}
    assert found == {str(number): [tokens[number], cached[number]] for number in range(5)}


def tokens_of(url: str) -> list[tuple[list[int], int]]:
    """Return the tokens and cached tokens of two prompts."""
    with engine_over(llama(), url) as engine:
        return [told(ask(engine, number)) for number in range(2)]


@pytest.mark.slow
def test_another_process_computes_after_the_server_came_back_empty(
    own_server: Server, tmp_path: Path
) -> None:
    tokens = [without_tiers(llama(), number) for number in range(2)]
    cold, warm = ([[each, count] for each in tokens] for count in (0, NUM_CACHED))
    assert in_a_process(f"{__name__}:tokens_of", over(own_server)) == cold
    assert in_a_process(f"{__name__}:tokens_of", over(own_server)) == warm
    own_server.stop()
    again = valkey(tmp_path, port=own_server.port)
    try:
        assert in_a_process(f"{__name__}:tokens_of", over(own_server)) == cold
        assert in_a_process(f"{__name__}:tokens_of", over(own_server)) == warm
    finally:
        again.stop()


def test_engines_find_prompts_of_one_another(server: Server) -> None:
    model = llama()
    tokens = without_tiers(model)
    with engine_over(model, over(server)) as first:
        assert told(ask(first)) == (tokens, 0)
    with engine_over(model, over(server)) as other:
        assert told(ask(other, namespace="other")) == (tokens, 0)
        output = ask(other)
    assert told(output) == (tokens, NUM_CACHED)
    assert output.cached_tokens_by_tier == {"valkey": NUM_CACHED}


def test_a_server_that_comes_back_empty_changes_no_token(
    own_server: Server, tmp_path: Path
) -> None:
    model = llama()
    tokens = [without_tiers(model, number) for number in range(2)]
    with engine_over(model, over(own_server)) as engine:
        for number in range(2):
            ask(engine, number)
    with engine_over(model, over(own_server)) as engine:
        assert told(ask(engine, 0)) == (tokens[0], NUM_CACHED)
        own_server.stop()
        again = valkey(tmp_path, port=own_server.port)
        try:
            assert told(ask(engine, 1)) == (tokens[1], 0)
        finally:
            again.stop()
