"""Messages of KV events: their groups, windows and adapters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvpager import BlockManager
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.kv_events.block_names import ContentNames, VLLMHashes
from kvpager.kv_events.translator import Translator
from kvpager.scheduling.request import lora_of_version, split_lora
from kvpager.storage.keys import KeyContext, PromptKeys
from tests.support.prefixes import A, B, C, D, cache, committed

WINDOWS = (None, 8)


def grouped(num_blocks: int = 32) -> GroupedManager:
    return GroupedManager(WINDOWS, num_blocks, 4, num_events=1000)


def follower(names: Any = None) -> Translator:
    return Translator(names or VLLMHashes("sha256", {}), windows=WINDOWS, int_hashes=False)


def stored(messages: list[Any], group: int) -> list[Any]:
    return [
        name
        for each in messages
        if each["type"] == "BlockStored" and each["group_idx"] == group
        for name in each["block_hashes"]
    ]


def test_blocks_that_follow_each_other_share_a_message() -> None:
    manager, translator = BlockManager(16, 4, num_events=100), follower()
    sequence = committed(manager, A, "acme")
    manager.append(sequence, B)
    manager.commit(sequence)
    cache(manager, C)
    first, second = translator.translate(manager.events.fetch())
    assert (first["token_ids"], first["extra_keys"]) == ([*A, *B], [("acme",), None])
    assert (second["token_ids"], second["parent_block_hash"]) == (C, None)


def test_a_block_names_the_block_before_it() -> None:
    manager, translator = BlockManager(16, 4, num_events=100), follower()
    sequence = committed(manager, A)
    (before,) = translator.translate(manager.events.fetch())
    manager.append(sequence, B)
    manager.commit(sequence)
    (after,) = translator.translate(manager.events.fetch())
    assert after["parent_block_hash"] == before["block_hashes"][0]


def test_a_block_of_a_window_has_the_hash_of_its_prompt() -> None:
    """As with vLLM: one hash, and the group beside it."""
    manager, translator = grouped(), follower()
    cache(manager, A + B + C + D, "acme", mm_hashes=[(1, 6, b"x")])
    messages = translator.translate(manager.events.fetch())
    full, windowed = stored(messages, 0), stored(messages, 1)
    assert len(full) == 4
    assert windowed == full
    shown = [each["extra_keys"] for each in messages if each["type"] == "BlockStored"]
    assert shown[-1] == [key for keys in shown[:-1] for key in keys]


def test_a_window_is_named_in_its_messages() -> None:
    manager, translator = grouped(), follower()
    cache(manager, A)
    full, windowed = translator.translate(manager.events.fetch())
    name = "kv_cache_spec_sliding_window"
    assert (full["kv_cache_spec_kind"], full[name]) == ("full_attention", None)
    assert (windowed["kv_cache_spec_kind"], windowed[name]) == ("sliding_window", 8)


def test_a_removed_block_names_its_group() -> None:
    manager, translator = grouped(), follower()
    cache(manager, A)
    translator.translate(manager.events.fetch())
    manager.clear_prefix_cache()
    removed = translator.translate(manager.events.fetch())
    assert {each["group_idx"] for each in removed} == {0, 1}
    assert {len(each["block_hashes"]) for each in removed} == {1}


def test_content_keys_of_windows_are_those_of_stores() -> None:
    context = KeyContext("layout", "model")
    names = ContentNames(4, lambda *_: context, WINDOWS)
    manager, translator = grouped(), follower(names)
    cache(manager, A + B + C)
    messages = translator.translate(manager.events.fetch())
    keys = PromptKeys(np.array(A + B + C, np.int32), 4, context, (), WINDOWS)
    for group in (0, 1):
        assert stored(messages, group) == [keys.of(group, position) for position in range(3)]


def test_a_block_is_named_after_the_block_before_it_was_evicted() -> None:
    manager, translator = grouped(), follower()
    sequence = committed(manager, A + B + C)
    translator.translate(manager.events.fetch())
    manager.clear_prefix_cache()  # of the window's group, the first block is idle
    manager.append(sequence, D)
    manager.commit(sequence)
    messages = translator.translate(manager.events.fetch())
    assert stored(messages, 1) == stored(messages, 0)
    assert len(stored(messages, 1)) == 1


def test_a_block_after_unknown_tokens_is_left_out() -> None:
    manager = grouped()
    sequence = committed(manager, A + B)
    follower().translate(manager.events.fetch())
    manager.append(sequence, C)
    manager.commit(sequence)
    (late,) = [event for event in manager.events.fetch() if event.group]
    translator = follower()
    assert translator.translate([late]) == []
    manager.free(sequence)
    manager.clear_prefix_cache()
    removed = [event for event in manager.events.fetch() if event.kind == "removed"]
    assert translator.translate(removed) == []


def test_hashes_of_windows_are_remembered_up_to_a_number() -> None:
    names = VLLMHashes("sha256", {}, num_remembered=3)
    manager, translator = grouped(), follower(names)
    cache(manager, A + B + C + D)
    translator.translate(manager.events.fetch())
    assert len(names._remembered) == 3


@pytest.mark.parametrize("manager", [BlockManager(32, 4, num_events=9), grouped()])
def test_all_cached_blocks_are_told_as_when_they_were_stored(manager: BlockManager) -> None:
    names = VLLMHashes("sha256", {})
    cache(manager, A + B + C, "acme", lora="x", mm_hashes=[(2, 9, b"i")])
    told = follower(names).translate(manager.events.fetch())
    again = follower(names).restart(manager.events.restart())
    for group in (0, 1):
        assert sorted(stored(again, group)) == sorted(stored(told, group))
    assert manager.events.fetch() == []


def test_blocks_of_an_older_cache_are_cleared_and_then_ignored() -> None:
    manager = BlockManager(16, 4, num_events=100)
    translator = Translator(VLLMHashes("sha256", {}), read_lora=split_lora)
    old = committed(manager, A)
    translator.translate(manager.events.fetch())
    cache(manager, B, lora=lora_of_version(None, 1))
    cleared, new = translator.translate(manager.events.fetch())
    assert (cleared["type"], new["type"], new["lora_name"]) == (
        "AllBlocksCleared",
        "BlockStored",
        None,
    )
    manager.append(old, C)
    manager.commit(old)
    assert translator.translate(manager.events.fetch()) == []
    manager.free(old)
    manager.clear_prefix_cache()
    (removed,) = translator.translate(manager.events.fetch())
    assert removed["block_hashes"] == new["block_hashes"]
