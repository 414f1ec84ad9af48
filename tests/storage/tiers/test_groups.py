"""Blocks of models with windows go to stores, and come back where a prompt continues."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpager.storage.keys import PromptKeys
from kvpager.storage.tiers.attaching import Attached
from tests.support.dict_store import DictStore
from tests.support.group_node import GroupNode
from tests.support.tier_node import SIZE, context_of, finished, prompt

WINDOWS: list[tuple[int | None, ...]] = [(9,), (None, 9), (None, 5, 9), (None, None, 1), (4, 13)]
LENGTH, CONTINUES = 61, 15  # tokens of a prompt; it continues after 15 blocks


def blocks_of_a_window(window: int) -> int:
    return -(-(window - 1) // SIZE)


def saved_by(windows: tuple[int | None, ...], **options: Any) -> GroupNode:
    node = GroupNode(windows, **options)
    node.compute(prompt(1, LENGTH))
    node.clean()
    return node


def longest(node: GroupNode, tokens: list[int]) -> int:
    """Return after how many blocks a prompt can continue with what is cached and stored."""
    windows, keys = (
        node.manager.windows,
        PromptKeys(
            np.array(tokens, np.int32), SIZE, context_of(None, None), [], node.manager.windows
        ),
    )
    cached = node.manager.cached_blocks(tokens) >= 0
    here = [
        [
            cached[group, at] or any(store.find([keys.of(group, at)]) for store in node.stores)
            for at in range((len(tokens) - 1) // SIZE)
        ]
        for group in range(len(windows))
    ]
    for end in range((len(tokens) - 1) // SIZE, 0, -1):
        firsts = [0 if w is None else max(end * SIZE - w + 1, 0) // SIZE for w in windows]
        if all(all(of[first:end]) for of, first in zip(here, firsts, strict=True)):
            return end
    return 0


# ---------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("reply", [0, 3, 50])
def test_a_windowed_group_saves_what_its_windows_need(
    windows: tuple[int | None, ...], reply: int
) -> None:
    node = GroupNode(windows)
    tokens = prompt(1, LENGTH)
    node.compute(tokens, reply)
    node.clean()
    saved = node.saved([*tokens, *(200 + number for number in range(reply))])
    for window, positions in zip(windows, saved, strict=True):
        if window is None:
            assert positions == list(range((LENGTH + reply) // SIZE))
        else:
            num_ends = 1 + (reply > 0)  # of the prompt, and of the reply
            assert len(positions) <= num_ends * (blocks_of_a_window(window) + 1)
    assert node.stores[0].num_saves == sum(map(len, saved))
    node.end()


@pytest.mark.parametrize("windows", WINDOWS)
def test_a_fetch_loads_what_the_prompt_needs_to_continue(windows: tuple[int | None, ...]) -> None:
    node = saved_by(windows)
    other = GroupNode(windows, node.stores)
    assert other.fetch(prompt(1, LENGTH)) == CONTINUES
    needed = [CONTINUES if w is None else blocks_of_a_window(w) for w in windows]
    assert node.stores[0].num_loads == sum(needed)
    assert other.compute(prompt(1, LENGTH)) == CONTINUES * SIZE
    assert other.clean() == 0  # fetched blocks are clean
    assert other.fetch(prompt(1, LENGTH)) == 0
    other.end()


# ----------------------------------------------------------------------------------- hits


@pytest.mark.parametrize("windows", WINDOWS)
def test_a_prompt_continues_after_a_reply(windows: tuple[int | None, ...]) -> None:
    node = GroupNode(windows, num_blocks=200)
    tokens = prompt(1, LENGTH)
    node.compute(tokens, 40)
    node.clean()
    chat = [*tokens, *(200 + number for number in range(40)), *prompt(2, 30)]
    other = GroupNode(windows, node.stores, num_blocks=200)
    assert other.fetch(chat) == (LENGTH + 40) // SIZE
    assert other.compute(chat) == (LENGTH + 40) // SIZE * SIZE
    other.end()


@pytest.mark.parametrize("windows", WINDOWS)
def test_a_beginning_is_found_once_a_prompt_continued_there(
    windows: tuple[int | None, ...],
) -> None:
    node = GroupNode(windows, num_blocks=200)
    front = prompt(1, 40)
    for seed in (2, 3):
        node.compute([*front, *prompt(seed, 21)])
    node.clean()
    other = GroupNode(windows, node.stores)
    assert other.fetch([*front, *prompt(4, 50)]) == 10
    assert other.compute([*front, *prompt(4, 50)]) == 40
    other.end()


def test_an_evicted_prompt_with_a_window_is_found_again() -> None:
    node = GroupNode((None, 9), num_blocks=24)
    for seed in range(5):
        node.compute(prompt(seed, LENGTH))
        node.clean()
    for seed in range(5):
        node.fetch(prompt(seed, LENGTH))
        assert node.compute(prompt(seed, LENGTH)) == CONTINUES * SIZE
        node.clean()
    node.end()


def test_what_the_device_has_is_not_loaded() -> None:
    node = saved_by((None, 9))
    other = GroupNode((None, 9), node.stores)
    other.compute(prompt(1, LENGTH)[:30])
    node.stores[0].num_loads = 0
    assert other.fetch(prompt(1, LENGTH)) == CONTINUES - 7
    assert node.stores[0].num_loads == CONTINUES - 7 + 2
    other.end()


def test_tenants_find_no_windows_of_others() -> None:
    node = GroupNode((None, 9))
    node.compute(prompt(1, LENGTH), namespace="a")
    node.clean()
    other = GroupNode((None, 9), node.stores)
    kinds: list[dict[str, Any]] = [{}, {"namespace": "b"}, {"namespace": "a", "lora": "x"}]
    assert [other.fetch(prompt(1, LENGTH), **kind) for kind in kinds] == [0, 0, 0]
    assert other.fetch(prompt(1, LENGTH), namespace="a") == CONTINUES
    other.end()


@pytest.mark.parametrize("other", [(9,), (9, None), (None, 8), (None, None), (None, 9, 9)])
def test_other_windows_find_nothing(other: tuple[int | None, ...]) -> None:
    node = saved_by((None, 9))
    stranger = GroupNode(other, node.stores)
    assert stranger.fetch(prompt(1, LENGTH)) == 0
    stranger.end()


def test_a_forgotten_namespace_leaves_no_window() -> None:
    node = GroupNode((None, 9))
    node.compute(prompt(1, LENGTH), namespace="a")
    node.clean()
    assert node.tiering.forget("a").result(60) == CONTINUES + 2
    assert node.fetch(prompt(1, LENGTH), namespace="a") == 0
    assert not node.stores[0].blocks
    node.end()


# ---------------------------------------------------------------------- several stores


def test_blocks_come_from_whichever_store_has_them() -> None:
    node = saved_by((None, 9))
    whole = list(node.stores[0].blocks.items())
    for seed in range(8):
        random.Random(seed).shuffle(whole)
        stores = [DictStore(node.storage.block_bytes) for _ in range(2)]
        for number, (key, block) in enumerate(whole):
            stores[number % 2].blocks[key] = block
        other = GroupNode((None, 9), stores)
        assert other.fetch(prompt(1, LENGTH)) == CONTINUES
        assert other.compute(prompt(1, LENGTH)) == CONTINUES * SIZE
        other.end()


@pytest.mark.parametrize("near", ["windows", "the rest"])
def test_windows_may_be_in_another_store(near: str) -> None:
    node = saved_by((None, 9))
    keys = PromptKeys(
        np.array(prompt(1, LENGTH), np.int32), SIZE, context_of(None, None), [], (None, 9)
    )
    full = {keys.of(0, at) for at in range(CONTINUES)}
    stores = [DictStore(node.storage.block_bytes) for _ in range(2)]
    for key, block in node.stores[0].blocks.items():
        stores[(key in full) == (near == "windows")].blocks[key] = block
    other = GroupNode((None, 9), stores)
    fetch = other.tiering.begin(prompt(1, LENGTH))
    assert fetch is not None
    finished(fetch)
    assert other.tiering.attach(fetch) == {"dict": CONTINUES * SIZE}
    other.settle()
    assert len(stores[0].blocks) == CONTINUES + 2
    assert other.compute(prompt(1, LENGTH)) == CONTINUES * SIZE
    other.end()


def test_a_lost_window_leaves_the_place_before_it() -> None:
    node = GroupNode((None, 9))
    node.compute(prompt(1, LENGTH)[:33])
    node.compute(prompt(1, LENGTH))
    node.clean()
    [store] = node.stores
    last = node.saved(prompt(1, LENGTH))[1][-1]
    keys = PromptKeys(
        np.array(prompt(1, LENGTH), np.int32), SIZE, context_of(None, None), [], (None, 9)
    )
    store.lost = {keys.of(1, last), keys.of(1, last - 1)}
    other = GroupNode((None, 9), node.stores)
    assert other.fetch(prompt(1, LENGTH)) == 8
    assert other.compute(prompt(1, LENGTH)) == 32
    other.end()


def test_a_store_that_fails_leaves_its_blocks_to_the_next() -> None:
    node = saved_by((None, 9))
    broken = DictStore(node.storage.block_bytes)
    broken.blocks, broken.fails = node.stores[0].blocks, True
    other = GroupNode((None, 9), [broken, *node.stores])
    assert other.fetch(prompt(1, LENGTH)) == CONTINUES
    other.end()


def test_a_store_is_asked_once_if_it_can_answer_for_each_key() -> None:
    class Remote(DictStore):
        num_questions = 0

        def find_each(self, keys: list[bytes]) -> list[bool]:
            self.num_questions += 1
            return [key in self.blocks for key in keys]

    node = saved_by((9, 5))
    remote = Remote(node.storage.block_bytes)
    remote.blocks = node.stores[0].blocks
    other = GroupNode((9, 5), [remote])
    assert other.fetch(prompt(1, LENGTH)) == CONTINUES
    assert remote.num_questions == 1
    other.end()


# ------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("most", [1, 2, 5, 16, 30])
def test_blocks_of_groups_are_copied_in_parts(most: int) -> None:
    node = saved_by((None, 9))
    other = GroupNode((None, 9), node.stores)
    fetch = other.tiering.begin(prompt(1, LENGTH))
    assert fetch is not None
    finished(fetch)
    added: list[dict[str, int]] = []
    while fetch.slots:
        assert other.tiering.begin(prompt(1, LENGTH)) is fetch
        before = len(fetch.slots)
        added.append(other.tiering.attach(fetch, most))
        assert before - len(fetch.slots) == min(most, before)
        other.manager.check()
    assert added == [{}] * (len(added) - 1) + [{"dict": CONTINUES * SIZE}]
    assert other.manager.num_held_blocks == 0
    assert other.compute(prompt(1, LENGTH)) == CONTINUES * SIZE
    other.end()


@pytest.mark.parametrize("end", ["cancel", "forget", "close"])
def test_a_fetch_that_ends_in_part_holds_no_block(end: str) -> None:
    node = GroupNode((None, 9))
    node.compute(prompt(1, LENGTH), namespace="a")
    node.clean()
    other = GroupNode((None, 9), node.stores)
    fetch = other.tiering.begin(prompt(1, LENGTH), namespace="a")
    assert fetch is not None
    finished(fetch)
    assert other.tiering.attach(fetch, 4) == {}
    assert other.manager.num_held_blocks > 0
    if end == "cancel":
        other.tiering.cancel(fetch)
    elif end == "forget":
        other.tiering.forget("a").result(60)
        assert other.tiering.attach(fetch) == {}
    other.end()
    assert other.manager.num_held_blocks == 0
    assert other.manager.num_free_blocks == other.manager.num_blocks


def test_staging_bounds_what_is_loaded() -> None:
    node = GroupNode((None, 9))
    for length in (21, LENGTH):
        node.compute(prompt(1, LENGTH)[:length])
    node.clean()
    other = GroupNode((None, 9), node.stores, slots=10)
    assert other.fetch(prompt(1, LENGTH)) == 5
    other.end()


def test_no_room_on_the_device_loses_the_fetch_only() -> None:
    node = saved_by((None, 9))
    other = GroupNode((None, 9), node.stores, num_blocks=20)
    running = other.manager.allocate(8)
    assert other.fetch(prompt(1, LENGTH)) == 0
    assert other.staging.num_free == other.staging.num_slots
    other.manager.free(running)
    assert other.fetch(prompt(1, LENGTH)) == CONTINUES
    other.end()


def test_tokens_are_divided_by_blocks() -> None:
    stores = [DictStore(0) for _ in range(3)]
    stores[0].name, stores[1].name = "host", "disk"
    keys = [bytes([number]) for number in range(6)]
    found = Attached(keys, [0, 2, 2, 0, 1, 2], num_new=5).num_tokens(stores, SIZE)
    assert found == {"host": 6, "disk": 4, "dict": 10}
    assert Attached(keys, [1] * 6, num_new=5).num_tokens(stores, SIZE) == {"disk": 20}
    assert Attached([], [], num_new=0).num_tokens(stores, SIZE) == {}


# ------------------------------------------------------------------------------ at random


TRAFFIC = given(
    windows=st.sampled_from(WINDOWS), seed=st.integers(0, 2**32), num_blocks=st.integers(60, 90)
)


@settings(max_examples=20, deadline=None)
@TRAFFIC
def test_any_traffic_finds_the_longest_prefix(
    windows: tuple[int | None, ...], seed: int, num_blocks: int
) -> None:
    find_the_longest_prefix(windows, seed, num_blocks)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@TRAFFIC
def test_more_traffic_finds_the_longest_prefix(
    windows: tuple[int | None, ...], seed: int, num_blocks: int
) -> None:
    find_the_longest_prefix(windows, seed, num_blocks)


def find_the_longest_prefix(windows: tuple[int | None, ...], seed: int, num_blocks: int) -> None:
    chance = random.Random(seed)
    stores = [DictStore(16 * SIZE) for _ in range(2)]
    nodes = [GroupNode(windows, stores, num_blocks=n) for n in (num_blocks, 200)]
    for _ in range(12):
        node = chance.choice(nodes)
        tokens = [*prompt(0, chance.randrange(1, 50)), *prompt(chance.randrange(3), 12)]
        match chance.randrange(5):
            case 0 | 1:
                node.compute(tokens[:60], chance.choice([0, 0, 9]))
                if chance.random() < 0.7:
                    node.clean()
            case 2:
                store = chance.choice(stores)
                store.drop(chance.sample(list(store.blocks), len(store.blocks) // 3))
            case 3:
                node.manager.clear_prefix_cache()
            case 4:
                expected = longest(node, tokens)
                fetch = node.tiering.begin(tokens)
                if fetch is not None:
                    finished(fetch)
                    while fetch.slots:
                        node.tiering.attach(fetch, chance.randrange(1, 20))
                        node.manager.check()
                    node.tiering.cancel(fetch)
                found = node.manager.match_prefix(tokens[:-1]) // SIZE
                assert found == expected
                node.compute(tokens)
        node.manager.check()
    for node in nodes:
        node.end()
