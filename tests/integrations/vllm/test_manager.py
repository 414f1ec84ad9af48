"""The manager of chunks in host memory: what is offered, who leaves, what is held."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.vllm_parts import LookupResult, Node, closing, context_of, key_of

HIT, MISS, PENDING = LookupResult.HIT, LookupResult.MISS, LookupResult.HIT_PENDING
KEYS = [key_of(number) for number in range(20)]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with closing(Node(tmp_path, num_slots=4, events=True)) as made:
        yield made


def found(node: Node, keys: list[Any]) -> list[Any]:
    return [node.manager.lookup(key, context_of()) for key in keys]


def events(node: Node) -> list[tuple[list[bytes], bool]]:
    return [(event.keys, event.removed) for event in node.manager.take_events()]


def test_a_chunk_is_a_hit_once_its_store_has_ended(node: Node) -> None:
    context = context_of(KEYS)
    assert found(node, KEYS[:1]) == [MISS]
    output = node.manager.prepare_store(KEYS[:2], context)
    assert output.keys_to_store == KEYS[:2]
    assert found(node, KEYS[:3]) == [PENDING, PENDING, MISS]
    node.manager.complete_store(set(KEYS[:2]), context)
    assert found(node, KEYS[:3]) == [HIT, HIT, MISS]


def test_a_failed_store_leaves_nothing(node: Node) -> None:
    context = context_of(KEYS)
    node.manager.prepare_store(KEYS[:2], context)
    node.manager.complete_store(set(KEYS[:2]), context, success=False)
    assert found(node, KEYS[:2]) == [MISS, MISS]
    assert node.save(KEYS[:4], [0, 1, 2, 3]) == KEYS[:4]


def test_loaded_blocks_have_the_bytes_that_were_saved(node: Node) -> None:
    want = node.blocks([3, 5])
    node.save(KEYS[:2], [3, 5])
    node.caches.tensors[0].tensor[:] = 0
    node.load(KEYS[:2], [7, 1], context_of())
    assert (node.blocks([7, 1]) == want).all()


def test_what_is_known_is_not_stored_again(node: Node) -> None:
    node.save(KEYS[:2], [0, 1])
    assert node.save(KEYS[:3], [0, 1, 2]) == KEYS[2:3]


def test_the_last_chunk_of_a_prompt_leaves_first(node: Node) -> None:
    context = context_of(KEYS)
    node.manager.on_new_request(context)
    for number in range(4):  # a chunk in each step
        node.save([KEYS[number]], [number], context)
    node.manager.on_request_finished(context)
    node.save([KEYS[9]], [0])
    assert found(node, KEYS[:4]) == [HIT, HIT, HIT, MISS]


def test_the_prompt_that_was_used_last_stays(node: Node) -> None:
    for first in (0, 2):
        context = context_of(KEYS)
        node.manager.on_new_request(context)
        node.save(KEYS[first : first + 2], [0, 1], context)
        node.manager.on_request_finished(context)
    reader = context_of(KEYS)
    node.manager.on_new_request(reader)
    node.load(KEYS[:2], [2, 3], reader)
    node.manager.on_request_finished(reader)
    node.save(KEYS[8:10], [0, 1])
    assert found(node, KEYS[:4]) == [HIT, HIT, MISS, MISS]


def test_with_lifetime_a_chunk_leaves_after_those_that_continue_it(tmp_path: Path) -> None:
    with closing(Node(tmp_path, num_slots=3, eviction="lifetime")) as node:
        prompt = context_of(KEYS[:3])
        for number in range(3):  # a chunk in each step
            node.save([KEYS[number]], [number], prompt)
        node.manager.on_request_finished(prompt)
        for number in (1, 2):  # the chunks before are on the device
            reader = context_of(KEYS[:3])
            node.load(KEYS[number:3], list(range(3 - number)), reader)
            node.manager.on_request_finished(reader)
        for number in (2, 1, 0):
            node.save([KEYS[9 + number]], [0])
            assert found(node, KEYS[:3]) == [HIT] * number + [MISS] * (3 - number)


def test_chunks_of_two_groups_are_two_prefixes(tmp_path: Path) -> None:
    with closing(Node(tmp_path, num_slots=4, eviction="lifetime")) as node:
        keys = [*KEYS[:2], key_of(0, 1), key_of(1, 1)]
        prompt = context_of()
        for key, position in zip(keys, (16, 32, 16, 32), strict=True):
            prompt.set_offload_key_position(key, position)
        node.save(keys, [0, 1, 2, 3], prompt)
        node.manager.on_request_finished(prompt)
        node.save(KEYS[9:11], [0, 1])
        assert found(node, keys) == [HIT, MISS, HIT, MISS]


def test_what_is_being_loaded_does_not_leave(node: Node) -> None:
    node.save(KEYS[:4], [0, 1, 2, 3])
    reader = context_of()
    node.manager.prepare_load(KEYS[:3], reader)
    assert node.save(KEYS[10:15], [0, 1, 2, 3, 4]) == KEYS[10:11]
    assert node.save(KEYS[10:14], [0, 1, 2, 3]) == []
    assert found(node, KEYS[:3]) == [HIT, HIT, HIT]
    node.manager.complete_load(set(KEYS[:3]), reader)
    assert node.save(KEYS[11:14], [0, 1, 2]) == KEYS[11:14]


def test_a_load_of_a_chunk_that_is_not_here_holds_nothing(node: Node) -> None:
    node.save(KEYS[:1], [0])
    with pytest.raises(KeyError, match="not in host memory"):
        node.manager.prepare_load(KEYS[:2], context_of())


def test_events_tell_what_was_stored_and_what_left(node: Node) -> None:
    node.save(KEYS[:4], [0, 1, 2, 3])
    assert events(node) == [(KEYS[:4], False)]
    node.save(KEYS[4:5], [0])
    assert events(node) == [(KEYS[3:4], True), (KEYS[4:5], False)]
    assert events(node) == []


def test_a_reset_forgets_chunks_and_the_transfers_under_way(node: Node) -> None:
    node.save(KEYS[:2], [0, 1])
    request = context_of(KEYS)
    node.manager.on_new_request(request)
    node.manager.prepare_load(KEYS[:1], request)
    node.manager.prepare_store(KEYS[2:4], request)
    node.manager.reset_cache()  # from here on vLLM ends none of them
    assert found(node, KEYS[:4]) == [MISS] * 4
    node.save(KEYS[:4], [0, 1, 2, 3], request)
    node.load(KEYS[:4], [4, 5, 6, 7], request)
    node.manager.on_request_finished(request)


def test_a_step_without_stores_does_nothing(node: Node) -> None:
    node.manager.on_schedule_end(SimpleNamespace())
    node.manager.touch(KEYS[:1], context_of())
    assert found(node, KEYS[:1]) == [MISS]
