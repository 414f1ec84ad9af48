"""Blocks of windowed groups that are worth saving: those that a prompt continues from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvpager.blocks.groups.digests import extend_digests
from kvpager.blocks.groups.manager import GroupedManager
from kvpager.blocks.mm_hashes import NO_MM_HASHES
from kvpager.storage.keys import (
    ContentKeying,
    KeyContext,
    KeyGroup,
    content_keys,
    window_keys,
)

SIZE = 4
CONTEXT = KeyContext("layout", "model", b"0" * 16, "adapter")
PROMPT = list(range(40))


def computed(manager: GroupedManager, tokens: list[int], reply: int = 0, **key: Any) -> list[int]:
    """Compute a prompt in chunks, and a reply token by token; leave its blocks cached."""
    sequence = manager.allocate(tokens, **key)
    for start in range(sequence.num_cached_tokens, len(tokens), 8):
        stop = min(start + 8, len(tokens))
        manager.open_slots(sequence, start, stop)
        manager.commit(sequence, stop)
    said = [1000 + number for number in range(reply)]
    for token in said:
        manager.append(sequence, [token])
        manager.commit(sequence)
    manager.free(sequence)
    return [*tokens, *said]


def offered(manager: GroupedManager, tokens: list[int]) -> list[list[int]]:
    """Return the positions of a prompt's blocks that are offered, for each group."""
    leaving = manager.cached.leaving(1000)
    return [np.flatnonzero(np.isin(of, leaving)).tolist() for of in manager.cached_blocks(tokens)]


def window_before(num_blocks: int, window: int) -> set[int]:
    """Return the blocks that the token after `num_blocks` blocks attends to."""
    first = max(num_blocks * SIZE - window + 1, 0) // SIZE
    return set(range(first, num_blocks))


@pytest.mark.parametrize("max_chunk", [8, None])
@pytest.mark.parametrize("length", [37, 38, 39, 40])
@pytest.mark.parametrize("window", [1, 2, 5, 7, 9, 100])
def test_the_last_windows_of_prompt_and_reply_are_offered(
    window: int, length: int, max_chunk: int | None
) -> None:
    manager = GroupedManager((None, window), 100, SIZE, max_chunk=max_chunk)
    for reply in (0, 1, 2, 3, 17, 26):
        manager.clear_prefix_cache()
        tokens = computed(manager, PROMPT[:length], reply)
        full, windowed = offered(manager, tokens)
        assert full == list(range(len(tokens) // SIZE))
        needed = window_before((length - 1) // SIZE, window)
        needed |= window_before(len(tokens) // SIZE, window)
        assert needed <= set(windowed)
        assert len(windowed) <= 2 * (-(-(window - 1) // SIZE) + 1)
        manager.check()


def test_a_block_that_a_prompt_continues_from_is_offered() -> None:
    manager = GroupedManager((5,), 100, SIZE)
    computed(manager, PROMPT)
    computed(manager, PROMPT[:24])  # its last token is computed again: it continues after 20
    assert offered(manager, PROMPT) == [[4, 5, 8, 9]]
    computed(manager, [*PROMPT[:16], 7, 8, 9])
    assert offered(manager, PROMPT) == [[3, 4, 5, 8, 9]]


def test_equal_blocks_of_a_sequence_that_is_computed_beside_are_offered() -> None:
    manager = GroupedManager((5,), 100, SIZE)
    one, other = manager.allocate(PROMPT), manager.allocate(PROMPT[:24])
    for sequence in (one, other):
        manager.commit(sequence)
    manager.free([one, other])
    assert offered(manager, PROMPT) == [[4, 5, 8, 9]]


def test_passing_blocks_are_no_loss() -> None:
    manager = GroupedManager((5,), 20, SIZE)
    computed(manager, PROMPT)
    keying = ContentKeying(SIZE, lambda *_: CONTEXT, manager.windows)
    manager.cached.keys(manager.cached.leaving(1), keying)
    manager.clear_prefix_cache()
    assert manager.cached.num_dropped_dirty == 2


def test_blocks_of_groups_leave_as_foretold() -> None:
    manager = GroupedManager((None, 9, 5), 60, SIZE)
    for start in (0, 5, 9):
        computed(manager, [start, *PROMPT[:20]])
    leaving = manager.cached.leaving(6)
    free = manager.num_free_blocks
    filler = manager.allocate(0)
    while len(gone := leaving[~np.isin(leaving, manager.cached.leaving(100))]) < len(leaving):
        manager.append(filler, SIZE)
        assert gone.tolist() == leaving[: len(gone)].tolist()
    assert free < manager.num_blocks


# ------------------------------------------------------------------------------------- keys


def test_the_keys_of_blocks_are_those_of_their_prompt() -> None:
    windows = (None, 7, None)
    manager = GroupedManager(windows, 100, SIZE)
    image = [(5, 11, b"image")]
    computed(manager, PROMPT, mm_hashes=image)
    tables = manager.cached_blocks(PROMPT, mm_hashes=image)
    keying = ContentKeying(SIZE, lambda *_: CONTEXT, windows)
    digests: list[bytes] = []
    sequence = manager.allocate(PROMPT, mm_hashes=image)
    shown = manager._state.rows.prompt(sequence._row).mm_hashes
    extend_digests(digests, np.array(PROMPT, np.int32).reshape(-1, SIZE), shown)
    for number in (0, 2):
        expected = content_keys(PROMPT, SIZE, CONTEXT, image, KeyGroup(number, windows))
        assert manager.cached.keys(tables[number], keying) == expected
    expected = window_keys(digests, SIZE, CONTEXT, KeyGroup(1, windows))
    assert manager.cached.keys(tables[1], keying) == expected


def test_no_two_groups_share_a_key() -> None:
    digests: list[bytes] = []
    extend_digests(digests, np.array(PROMPT, np.int32).reshape(-1, SIZE), NO_MM_HASHES)
    found = [content_keys(PROMPT, SIZE, CONTEXT)]
    for windows in ((None, 7), (7, None), (None, 8), (None, None), (7, 7), (7,)):
        for number, window in enumerate(windows):
            group = KeyGroup(number, windows)
            if window is None:
                found.append(content_keys(PROMPT, SIZE, CONTEXT, group=group))
            else:
                found.append(window_keys(digests, SIZE, CONTEXT, group))
    keys = [key for of_group in found for key in of_group]
    assert len(set(keys)) == len(keys)


def test_a_windowed_key_is_the_same_on_every_machine() -> None:
    digests: list[bytes] = []
    extend_digests(digests, np.array([[1, 2], [3, -4]], ">i4"), NO_MM_HASHES)
    keys = window_keys(digests, 2, CONTEXT, KeyGroup(1, (None, 7)))
    assert [key.hex()[:16] for key in keys] == ["0477b208b0665509", "6e848efec44e0f4d"]


# ---------------------------------------------------------------------------------- restore


def test_restored_blocks_are_found_by_the_next_prompt() -> None:
    manager = GroupedManager((None, 9), 60, SIZE, max_chunk=8)
    sequence, missing = manager.restore(PROMPT, 9)
    assert [np.flatnonzero(of_group).tolist() for of_group in missing] == [[*range(9)], [7, 8]]
    assert manager.num_held_blocks == 11
    assert manager.match_prefix(PROMPT) == 0
    manager.check()
    manager.commit(sequence)
    manager.free(sequence)
    assert manager.num_held_blocks == 0
    assert manager.match_prefix(PROMPT) == 36
    again, missing = manager.restore(PROMPT, 10)
    assert [np.flatnonzero(of_group).tolist() for of_group in missing] == [[9], [9]]
    manager.free(again)
    manager.check()


def test_a_sequence_that_was_not_filled_leaves_nothing() -> None:
    manager = GroupedManager((5, 9), 60, SIZE)
    sequence, _ = manager.restore(PROMPT, 9, namespace="a")
    manager.free(sequence)
    assert manager.num_free_blocks == 60
    assert (manager.cached_blocks(PROMPT, namespace="a") < 0).all()
    with pytest.raises(ValueError, match="num_blocks=11"):
        manager.restore(PROMPT, 11)


def test_a_window_of_one_token_needs_no_block() -> None:
    manager = GroupedManager((None, 1), 60, SIZE)
    sequence, missing = manager.restore(PROMPT, 9)
    assert missing.sum(axis=1).tolist() == [9, 0]
    manager.commit(sequence)
    manager.free(sequence)
    assert manager.match_prefix(PROMPT) == 36
