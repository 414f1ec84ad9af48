"""Interrupts of a tiering, at every moment: a call completes, and nothing leaks."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest

from kvpager.storage.tiers.loading import Fetch
from tests.support.interrupts import Moments, by_signal
from tests.support.tier_node import Node, finished, prompt

NUM_SLOTS = 8


class Scene(NamedTuple):
    """A node whose stores have `prompt(1)`, a loaded fetch of it, and a dirty prompt."""

    node: Node
    fetch: Fetch | None


def scene(*, is_loaded: bool) -> Scene:
    node = Node(num_blocks=16, slots=NUM_SLOTS)
    node.compute(prompt(1))
    node.clean()
    node.manager.clear_prefix_cache()
    node.compute(prompt(9))
    fetch = node.tiering.begin(prompt(1)) if is_loaded else None
    if fetch is not None:
        finished(fetch)
    return Scene(node, fetch)


def begin(node: Node, fetch: Fetch | None) -> None:
    node.tiering.begin(prompt(1))


def attach(node: Node, fetch: Fetch | None) -> None:
    assert fetch is not None
    node.tiering.attach(fetch)


def cancel(node: Node, fetch: Fetch | None) -> None:
    assert fetch is not None
    node.tiering.cancel(fetch)


def clean(node: Node, fetch: Fetch | None) -> None:
    node.tiering.clean()


CALLS = [(begin, False), (attach, True), (cancel, True), (clean, False)]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "is_loaded"), CALLS, ids=[call.__name__ for call, _ in CALLS])
def test_an_interrupted_call_leaves_nothing_behind(
    call: Callable[[Node, Fetch | None], None], is_loaded: bool
) -> None:
    for number in itertools.count(1, 7):
        node, fetch = scene(is_loaded=is_loaded)
        moment = Moments(number, by_signal)
        with contextlib.suppress(KeyboardInterrupt), moment:
            call(node, fetch)
        if not moment.was_hit:
            node.end()
            assert number > 7
            return
        if fetch is not None:
            node.tiering.cancel(fetch)
        node.settle()
        assert not node.tiering.stats().num_fetching
        assert not node.manager.stats().num_kept
        node.staging._slots._tier.check()
        node.compute(prompt(9))
        node.clean()
        node.fetch(prompt(1))
        node.end()  # no slot is left, and no block is held
