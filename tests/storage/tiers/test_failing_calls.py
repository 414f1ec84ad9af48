"""A call that fails within another one: no staging slot is lost, and no block stays held."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kvpager.storage.tiers.prompt_saving import PromptSave
from tests.support.dict_store import DictStore
from tests.support.group_node import GroupNode
from tests.support.tier_node import Node, finished, prompt

NUM_SLOTS = 8


class Broken(BaseException):
    """No handler of an error expects it."""


def node_with_a_prompt(kind: str) -> Node:
    """Return a node whose second store has `prompt(1)`, and that computed `prompt(9)`."""
    upper, lower = (DictStore(Node().storage.block_bytes) for _ in range(2))
    options: dict[str, Any] = {"num_blocks": 32, "slots": NUM_SLOTS, "max_wait_s": 60.0}
    if kind == "groups":
        node: Node = GroupNode((None,), [upper, lower], **options)
    else:
        node = Node([upper, lower], **options)
    node.compute(prompt(1))
    node.clean()
    upper.drop(list(upper.blocks))
    node.clean()
    node.manager.clear_prefix_cache()
    node.compute(prompt(9))
    return node


def clean(node: Node) -> None:
    node.tiering.clean()


def attach(node: Node) -> None:
    fetch = node.tiering.begin(prompt(1))
    assert fetch is not None
    finished(fetch)
    try:
        node.tiering.attach(fetch, 2)
        node.tiering.attach(fetch)
    except BaseException:
        node.tiering.cancel(fetch)
        raise


def save_prompt(node: Node) -> None:
    identity: Any = {"namespace": None, "lora": None, "mm_hashes": []}
    node.tiering.prompts.save(PromptSave(prompt(9), identity))  # type: ignore[arg-type]


# The calls that `clean`, `attach` and `save` make while they own slots.
POINTS: dict[str, Callable[[Node], Any]] = {
    "read": lambda node: node.staging,
    "write": lambda node: node.staging,
    "block_tables": lambda node: node.manager,
    "commit": lambda node: node.manager,
    "keys": lambda node: node.manager.cached,
    "namespaces": lambda node: node.manager.cached,
    "mark_offered": lambda node: node.manager.cached,
    "mark_clean": lambda node: node.manager.cached,
    "note": lambda node: node.tiering._admissions,
    "save": lambda node: node.tiering.followers,
    "load": lambda node: node.tiering.followers,
    "promote": lambda node: node.tiering._saver,
    "submit": lambda node: node.tiering._saver._thread,
}


@pytest.mark.parametrize("kind", ["blocks", "groups"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", POINTS)
@pytest.mark.parametrize("call", [clean, attach, save_prompt])
def test_a_failure_loses_no_slot(
    call: Callable[[Node], None], name: str, after: bool, kind: str, monkeypatch: Any
) -> None:
    if (name, after) in {("write", True), ("submit", True)}:
        pytest.skip("it owns the slots then, and raises nothing any more")
    node = node_with_a_prompt(kind)
    owner = POINTS[name](node)
    working = getattr(owner, name)

    def failing(*arguments: Any, **options: Any) -> None:
        if after:
            working(*arguments, **options)
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with contextlib.suppress(Broken):
            call(node)
    node.settle()
    assert node.staging.num_free == NUM_SLOTS
    assert node.manager.stats().num_kept == 0
    assert not node.tiering.stats().num_fetching
    node.compute(prompt(9))
    node.clean()
    node.fetch(prompt(1))
    node.end()


def test_a_thread_that_does_not_start_saves_nothing_twice(monkeypatch: Any) -> None:
    node = Node(slots=NUM_SLOTS)
    node.compute(prompt(1))

    def refuse(thread: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert node.tiering.clean() == 5
    assert len(node.stores[0].blocks) == 5
    assert node.staging.num_free == NUM_SLOTS
    node.settle()  # `submit` had queued the save
    assert node.staging.num_free == NUM_SLOTS
    node.end()
