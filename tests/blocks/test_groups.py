"""Managers over groups of layers: one pool, blocks behind windows, all groups or none."""

from __future__ import annotations

import contextlib
import secrets
import signal
from typing import Any

import numpy as np
import pytest

from kvpager import OutOfBlocks
from kvpager.blocks.groups.manager import GroupedManager
from tests.support.interrupts import Moments, by_signal
from tests.support.manager_state import differences, state_of


def state_of_groups(manager: GroupedManager) -> dict[str, Any]:
    """Return all that a manager over groups knows, but for room that is not used."""
    rows = manager._state.rows
    return {
        **state_of(manager),
        "groups.waiting": np.array(sorted(rows.waiting_ids)),
        "groups.digests": np.array([[row, len(found)] for row, found in rows.digests.items()]),
    }


def begun() -> tuple[GroupedManager, Any]:
    """Return a manager with a sequence that is computed in part, and little room."""
    manager = GroupedManager((None, 5, 9), 40, 4, 40, max_chunk=8)
    sequence = manager.allocate(range(30))
    for start in (0, 8):
        manager.open_slots(sequence, start, start + 8)
        manager.commit(sequence, start + 8)
    return manager, sequence


def allocate_a_hit() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    manager.free(sequence)
    return manager, lambda: manager.allocate(range(20))


def open_a_chunk() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    return manager, lambda: manager.open_slots(sequence, 16, 24)


def commit_a_chunk() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    manager.open_slots(sequence, 16, 24)
    return manager, lambda: manager.commit(sequence, 24)


def append_in_part() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    other = manager.allocate(3)
    return manager, lambda: manager.append([sequence, other], counts=[5, 2])


def fork_twice() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    return manager, lambda: manager.fork(sequence, 9)


def truncate() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    return manager, lambda: manager.truncate(sequence, 16)


def swap_out() -> tuple[GroupedManager, Any]:
    manager, sequence = begun()
    return manager, lambda: manager.swap(sequence, "host")


CHANGES = [
    allocate_a_hit,
    open_a_chunk,
    commit_a_chunk,
    append_in_part,
    fork_twice,
    truncate,
    swap_out,
]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX signals")
@pytest.mark.parametrize("scenario", CHANGES)
def test_an_interrupted_call_is_complete_or_has_changed_nothing(
    scenario: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two managers with the same history are equal, their tickets included.
    monkeypatch.setattr(secrets, "randbits", lambda bits: 1)
    manager, operation = scenario()
    operation()
    complete = state_of_groups(manager)
    for number in range(1 + CHANGES.index(scenario), 10_000, 11):
        manager, operation = scenario()
        before, moment = state_of_groups(manager), Moments(number, by_signal)
        with contextlib.suppress(KeyboardInterrupt), moment:
            operation()
            assert not moment.was_hit, "the signal was lost"
        if not moment.was_hit:
            break
        manager.check()
        after = state_of_groups(manager)
        assert not differences(after, before) or not differences(after, complete), number
    else:
        pytest.fail("the operation never came through")


def test_what_one_group_lacks_no_group_takes() -> None:
    manager = GroupedManager((None, 8), 9, 4)
    sequence = manager.allocate(range(16))  # four blocks each
    with pytest.raises(OutOfBlocks) as caught:
        manager.append(sequence)
    assert (caught.value.need, caught.value.free) == (2, 1)
    assert manager.num_free_blocks == 1
    with pytest.raises(OutOfBlocks, match="need 4 device blocks, 1 free"):
        manager.allocate(8)
    manager.check()


def test_a_block_behind_the_window_stays_cached_and_leaves_first() -> None:
    manager = GroupedManager((4,), 8, 4)
    one = manager.allocate(range(16))
    manager.commit(one)
    assert (manager.stats().num_held, manager.stats().num_cached) == (1, 3)
    manager.free(one)
    other = manager.allocate(range(100, 128))  # evicts all but one block
    assert manager.stats().num_cached == 1
    manager.free(other)
    assert manager.match_prefix(range(16)) == 16  # served by the last window alone
    assert manager.match_prefix(range(12)) == 0


def test_match_prefix_returns_the_blocks_of_every_group() -> None:
    manager = GroupedManager((None, 4), 40, 4)
    manager.free(manager.allocate(range(12)), publish=True)
    match = manager.match_prefix(range(13), blocks=True)
    assert match.num_tokens == 12
    shared = manager.block_tables(manager.allocate(range(13)))[:, 0, :3]
    assert match.blocks.tolist() == shared.tolist()
    assert (match.blocks[1] < 0).tolist() == [True, True, False]
    unknown = manager.match_prefix([99] * 12, blocks=True)
    assert (unknown.num_tokens, unknown.blocks.shape) == (0, (2, 0))


def test_a_hit_has_every_block_of_the_last_window() -> None:
    manager = GroupedManager((9,), 8, 4)  # the token after 24 looks at the last two blocks
    one = manager.allocate(range(24))
    manager.commit(one, 16)
    manager.commit(one)
    manager.free(one)
    served = []
    for num_fresh in range(3, 9):  # the blocks leave one after the other
        manager.free(manager.allocate(4 * num_fresh))
        left = manager.stats().num_cached
        served.append((left, manager.match_prefix(range(24))))
    assert served == [(5, 24), (4, 24), (3, 24), (2, 24), (1, 0), (0, 0)]


def test_tokens_after_a_truncation_get_new_digests() -> None:
    manager = GroupedManager((2,), 40, 4)
    manager.commit(manager.allocate(range(8)))
    old, new, end = [20, 21, 22, 23], [50, 51, 52, 53], [60, 61, 62, 63]
    sequence = manager.allocate([*range(8), *old, 0])
    assert sequence.num_cached_tokens == 8
    manager.truncate(sequence, 8)
    manager.append(sequence, [*new, *end])
    manager.commit(sequence)
    assert manager.match_prefix([*range(8), *new, *end]) == 16
    assert manager.match_prefix([*range(8), *old, *end]) == 8


def test_groups_and_namespaces_share_no_prefix() -> None:
    manager = GroupedManager((6, 6), 40, 4)
    manager.commit(manager.allocate(range(12), namespace="a"))
    assert manager.match_prefix(range(12), namespace="a") == 12
    assert manager.match_prefix(range(12)) == 0
    assert manager.match_prefix(range(12), namespace="a", lora="b") == 0
    again = manager.allocate(range(13), namespace="a")
    one, other = manager.block_tables(again)[:, 0]
    assert not set(one[one >= 0]) & set(other[other >= 0])


def test_an_equal_block_after_another_prompt_is_not_reused() -> None:
    manager = GroupedManager((4,), 40, 4)
    manager.commit(manager.allocate([1, 1, 1, 1, 7, 7, 7, 7]))
    assert manager.match_prefix([1, 1, 1, 1, 7, 7, 7, 7]) == 8
    assert manager.match_prefix([2, 2, 2, 2, 7, 7, 7, 7]) == 0
    assert manager.match_prefix([7, 7, 7, 7]) == 0


def test_contents_before_the_window_tell_prompts_apart() -> None:
    manager = GroupedManager((4,), 40, 4)
    manager.commit(manager.allocate(range(12), mm_hashes=[(0, 3, b"cat")]))
    assert manager.match_prefix(range(12), mm_hashes=[(0, 3, b"cat")]) == 12
    assert manager.match_prefix(range(12), mm_hashes=[(0, 3, b"dog")]) == 0


def test_a_quota_counts_the_blocks_of_all_groups() -> None:
    manager = GroupedManager((None, 8), 40, 4)
    manager.quotas.set("a", ceiling=6)
    sequence = manager.allocate(range(12), namespace="a")
    with pytest.raises(OutOfBlocks):
        manager.append(sequence)
    manager.commit(sequence)
    manager.free(sequence)
    manager.free(manager.allocate(range(50, 62), namespace="a"))
    manager.check()
    assert manager.stats().num_held == 0


@pytest.mark.parametrize("windows", [(), (0,), (None, -1), (2.5,)])
def test_windows_that_make_no_sense_are_refused(windows: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="window"):
        GroupedManager(windows, 8)


def test_accept_keeps_tokens_that_have_no_room_yet() -> None:
    manager = GroupedManager((5,), 40, 4, max_chunk=4)
    waiting, speculating = manager.allocate(range(20)), manager.allocate([1, 2, 3])
    manager.append(speculating, [4, 5], speculative=True)
    manager.accept([waiting, speculating], [0, 1])
    assert manager.lengths([waiting, speculating]).tolist() == [20, 4]
    manager.check()
    manager.commit(waiting, 4)
    assert manager.open_slots(waiting, 4, 8).shape == (1, 4)


def test_victims_and_a_smaller_pool_count_the_blocks_of_all_groups() -> None:
    manager = GroupedManager((None, 8), 20, 4)
    one, other = manager.allocate(range(8)), manager.allocate(range(50, 58))
    assert manager.victims([other, one], 5) == [other, one]
    manager.free(one)
    plan = manager.shrink(4)
    assert (len(plan), manager.num_blocks, manager.num_free_blocks) == (4, 4, 0)
    assert sorted(manager.block_tables([other]).ravel().tolist()) == [0, 1, 2, 3]
    manager.check()


def test_a_sequence_ends_in_a_pool_without_the_block_behind_its_window() -> None:
    manager = GroupedManager((4,), 8, 4)
    other, sequence = manager.allocate(20), manager.allocate(range(11))
    manager.commit(sequence)  # releases its first two blocks
    manager.free(other)
    manager.shrink(2)
    manager.free(sequence)
    manager.check()


def test_blocks_of_groups_are_dropped_by_commit_alone() -> None:
    manager = GroupedManager((None, 4), 20, 4)
    sequence = manager.allocate(range(12))
    with pytest.raises(ValueError, match="commit"):
        manager.drop_before(sequence, 8)
    manager.commit(sequence)
    assert (manager.block_tables(sequence) < 0).tolist() == [[[False] * 3], [[True, True, False]]]
