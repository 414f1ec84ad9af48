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
    PromptKeys,
    content_keys,
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


def keys_of(
    windows: tuple[int | None, ...], tokens: list[int], image: Any = ()
) -> list[list[bytes]]:
    """Return the keys of a prompt's blocks, for each group."""
    keys = PromptKeys(np.array(tokens, np.int32), SIZE, CONTEXT, image, windows)
    blocks = range(len(tokens) // SIZE)
    return [[keys.of(group, at) for at in blocks] for group in range(len(windows))]


def test_the_keys_of_blocks_are_those_of_their_prompt() -> None:
    windows, image = (None, 7, None), [(5, 11, b"image")]
    manager = GroupedManager(windows, 100, SIZE)
    computed(manager, PROMPT, mm_hashes=image)
    tables = manager.cached_blocks(PROMPT, mm_hashes=image)
    keying = ContentKeying(SIZE, lambda *_: CONTEXT, windows)
    found = [manager.cached.keys(table, keying) for table in tables]
    assert found == keys_of(windows, PROMPT, image)


def test_no_two_groups_share_a_key() -> None:
    groups = [(None,), (None, 7), (7, None), (None, 8), (None, None), (7, 7), (7,)]
    found = [key for windows in groups for of in keys_of(windows, PROMPT) for key in of]
    assert len(set(found)) == len(found)
    assert keys_of((None,), PROMPT) == [content_keys(PROMPT, SIZE, CONTEXT)]


def test_windowed_keys_are_the_same_on_every_machine() -> None:
    [keys] = keys_of((7,), [1, 2, 3, -4, *range(4)])
    assert [key.hex()[:16] for key in keys] == ["d7d40d34d03810d5", "4660cbd08b30a878"]
    digests: list[bytes] = []
    extend_digests(digests, np.array([[1, 2, 3, -4]], ">i4"), NO_MM_HASHES)
    assert [digest.hex()[:16] for digest in digests] == ["46a851520c4b3962"]


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
