"""Requests share no prefixes that another state of the model computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.support.toy_runner import ToyEngine, expected

PROMPT = list(range(40))


class State(NamedTuple):
    version: int
    doubt: str | None


class Watch:
    """A model watch that tests control."""

    def __init__(self) -> None:
        self.version = 0
        self.doubt: str | None = None
        self.looks = self.glances = 0
        self.during_look: Callable[[], None] | None = None

    def look(self) -> State:
        self.looks += 1
        state = State(self.version, self.doubt)
        if self.during_look is not None:
            during, self.during_look = self.during_look, None
            during()
        return state

    def glance(self) -> State:
        self.glances += 1
        return State(self.version, self.doubt)


def test_a_change_of_the_model_drops_cached_prefixes() -> None:
    watch = Watch()
    with ToyEngine(core={"watch": watch}) as engine:
        for _ in range(2):
            assert engine.ask(PROMPT, 2).result().token_ids == expected(PROMPT, 2)
        hits = engine.stats().pool.prefix_hit_tokens
        assert hits >= 36
        watch.version = 1
        engine.ask(PROMPT, 2).result()
        stats = engine.stats()
        assert stats.pool.prefix_hit_tokens == hits
        assert (stats.model_changes, stats.unshared) == (1, None)


def test_the_whole_model_is_checked_before_a_request_starts() -> None:
    watch = Watch()
    with ToyEngine(core={"watch": watch}) as engine:
        engine.ask(PROMPT, 10).result()
        assert 1 <= watch.looks <= 2  # twice if the request arrived during the first check
        assert watch.glances >= 8


def test_a_model_in_doubt_shares_no_prefixes() -> None:
    watch = Watch()
    watch.doubt = "it cannot be told"
    with ToyEngine(core={"watch": watch}) as engine:
        for _ in range(3):
            engine.ask(PROMPT, 2).result()
        stats = engine.stats()
    assert stats.pool.prefix_hit_tokens == 0
    assert stats.unshared == "it cannot be told"
    assert stats.model_changes == 0


def test_a_request_that_arrives_during_a_check_repeats_it() -> None:
    """The caller may have changed the model after the check."""
    watch, streams = Watch(), []

    def change_and_submit() -> None:
        watch.version = 1
        streams.append(engine.ask(PROMPT, 2))

    with ToyEngine(core={"watch": watch}) as engine:
        engine.ask(PROMPT, 2).result()
        with engine.pause():
            pass
        engine.ask(PROMPT, 2).result()  # caches the prefix again
        hits = engine.stats().pool.prefix_hit_tokens
        watch.during_look = change_and_submit
        engine.ask([7, 8, 9], 1).result()
        streams[0].result()
        stats = engine.stats()
    assert stats.model_changes == 1
    assert stats.pool.prefix_hit_tokens == hits
