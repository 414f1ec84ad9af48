"""A store that breaks the protocol costs an engine its blocks, and neither a token nor a slot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvpager.storage.tiers.protocol import StoreStats
from tests.support.dict_store import DictStore
from tests.support.toy_runner import expected
from tests.support.toy_tiers import BLOCK_BYTES, PROMPT, TieredEngine, store_with_the_prompt

Change = Callable[[Any], Any]

OUTCOMES: dict[str, Change] = {
    "none": lambda outcomes: None,
    "list": list,
    "too few": lambda outcomes: outcomes[:1],
    "too many": lambda outcomes: np.concatenate([outcomes, outcomes]),
    "a number": lambda outcomes: np.uint8(0),
    "columns": lambda outcomes: outcomes[:, None],
    "bools": lambda outcomes: outcomes == 0,  # a miss is False, which equals `Loaded.HIT`
    "unknown": lambda outcomes: outcomes + 77,
}
FOUND: dict[str, Change] = {
    "none": lambda count: None,
    "negative": lambda count: -3,
    "fraction": lambda count: 2.5,
    "far too many": lambda count: 10**9,
}


class BadStore(DictStore):
    """A store whose answers are changed. It has a bound, so its statistics are asked for."""

    found: Change = staticmethod(lambda count: count)
    loaded: Change = staticmethod(lambda outcomes: outcomes)
    saved: Change = staticmethod(lambda outcomes: outcomes)
    broken: str | None = None

    def _ask(self, name: str) -> None:
        if name == self.broken:
            raise RuntimeError(f"{name} is broken")

    def find(self, keys: Any) -> Any:
        self._ask("find")
        return self.found(super().find(keys))

    def load(self, keys: Any, into: Any, deadline: float) -> Any:
        self._ask("load")
        for buffer in into:
            buffer[:] = bytes([7]) * BLOCK_BYTES  # of a miss it holds anything
        return self.loaded(super().load(keys, into, deadline))

    def save(self, keys: Any, blocks: Any, deadline: float) -> Any:
        self._ask("save")
        return self.saved(super().save(keys, blocks, deadline))

    def drop(self, keys: Any) -> bool:
        self._ask("drop")
        return super().drop(keys)

    def stats(self) -> StoreStats:
        self._ask("stats")
        return StoreStats(len(self.blocks), 60, self.block_bytes)

    @property
    def bypassed(self) -> bool:
        self._ask("bypassed")
        return False


def bad(*, lost: bool = True, **answers: Any) -> BadStore:
    """A store that seems to have the prompt. A part of it is missing, if `lost`."""
    store, whole = BadStore(BLOCK_BYTES), store_with_the_prompt()
    store.blocks = whole.blocks
    store.lost = set(list(store.blocks)[4:]) if lost else set()
    for name, answer in answers.items():
        setattr(store, name, answer)
    return store


def serve(store: BadStore, broken: str | None = None) -> int:
    """Ask prompts that push each other out. Return the cached tokens of the first."""
    cached = []
    steps: list[Any] = []
    with TieredEngine([store], 24, slots=12, core={"on_step": steps.append}) as engine:
        store.broken = broken
        for number in range(6):
            prompt = PROMPT if number % 2 == 0 else [number * 50 + n for n in range(37)]
            output = engine.ask(prompt, 4, namespace=None).result(60)
            assert output.token_ids == expected(prompt, 4)
            cached.append(output.num_cached_tokens)
            engine.saved()
        assert engine._fetching is not None
        assert engine._fetching._is_on  # for the other stores
        assert engine.staging.num_free == engine.slots
        engine.check_idle()
        store.broken = None
    assert steps
    return cached[0]


@pytest.mark.parametrize("answer", OUTCOMES)
def test_loads_with_bad_outcomes_serve_nothing_wrong(answer: str) -> None:
    assert serve(bad(loaded=OUTCOMES[answer])) == 0


@pytest.mark.parametrize("answer", OUTCOMES)
def test_saves_with_bad_outcomes_keep_no_slot(answer: str) -> None:
    assert serve(bad(saved=OUTCOMES[answer], lost=False)) == 36


@pytest.mark.parametrize("answer", FOUND)
def test_a_look_up_that_lies_serves_nothing_wrong(answer: str) -> None:
    assert serve(bad(found=FOUND[answer])) in (0, 16)


@pytest.mark.parametrize("name", ["find", "load", "save", "drop", "stats", "bypassed"])
def test_a_store_that_raises_turns_nothing_off(name: str) -> None:
    assert serve(bad(lost=False), name) in (0, 36)
