"""A recorder of a manager: what it begins with, what it notes, and what stops it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvpager import BlockManager
from kvpager.blocks import prefix
from kvpager.recording.reader import Recording
from kvpager.recording.recorder import Described, Recorder
from kvpager.recording.replay import ReplayedState
from tests.support.recorded import Recorded

MANAGER = Described(source="manager")


def committed(manager: BlockManager, ids: list[int]) -> None:
    sequence = manager.allocate(ids)
    manager.commit(sequence)
    manager.free(sequence)


def test_the_first_step_has_all_that_a_used_manager_has() -> None:
    manager = BlockManager(16, 4, 4)
    committed(manager, [*range(8)])
    manager.swap(manager.allocate([1, 2, 3]), "host")
    manager.fork(manager.allocate([*range(8), 9]))
    step = Recorded(manager).step()
    assert len(step.begin) == 3
    assert step.cached


def test_a_step_without_changes_has_a_number_and_a_time_only() -> None:
    manager = BlockManager(16, 4)
    recorded, sequence = Recorded(manager), manager.allocate(3)
    for _ in range(2):
        manager.append(sequence)
        recorded.step()
    assert recorded.step().decode == ()  # the sequence grows no longer
    recorded.step()
    assert set(json.loads(recorded.lines.lines[-1])) == {"step", "t"}


def test_a_look_between_steps_adds_a_line_only_for_news() -> None:
    manager = BlockManager(16, 4)
    recorded = Recorded(manager)
    recorded.step()
    recorded.recorder.step(is_needed=False)
    assert len(recorded.lines.lines) == 1
    manager.allocate(3)
    recorded.recorder.step(is_needed=False)
    assert len(recorded.lines.lines) == 2


def test_a_sequence_that_goes_on_growing_is_listed_once() -> None:
    manager = BlockManager(16, 4)
    sequence = manager.allocate(3)
    recorded = Recorded(manager)
    recorded.step()
    listed = []
    for _ in range(6):
        manager.append(sequence)
        listed.append(recorded.step().decode)
    assert listed == [(0,), None, None, None, None, None]


def test_blocks_that_were_evicted_and_published_again_move_in_the_tree() -> None:
    manager = BlockManager(3, 4)
    recorded = Recorded(manager)
    committed(manager, [*range(8)])
    recorded.step()
    committed(manager, [*range(20, 32)])  # takes the same blocks
    recorded.step()
    committed(manager, [*range(4), *range(40, 44)])
    recorded.step()
    assert recorded.state.totals.evicted > 3


def test_a_pool_that_grows_and_shrinks_is_followed() -> None:
    manager = BlockManager(8, 4)
    recorded = Recorded(manager)
    committed(manager, [*range(12)])
    sequence = manager.allocate([*range(12), 5])
    recorded.step()
    manager.grow(32)
    committed(manager, [*range(50, 70)])
    other = manager.allocate([*range(80, 120)])
    manager.commit(other)  # its published blocks move when the pool shrinks
    assert recorded.step().num_blocks == 32
    manager.free(sequence)
    manager.shrink(12)
    recorded.step()
    assert len(other) == 40


def test_more_blocks_than_the_index_remembers_are_read_from_its_trees(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix, "_RECENT_MAX", 2)
    manager = BlockManager(64, 4)
    recorded = Recorded(manager)
    recorded.step()
    for number in range(5):
        committed(manager, [*range(9), number, number, number])
    recorded.step()


def test_two_recorders_of_a_manager_see_the_same() -> None:
    manager = BlockManager(64, 4)
    both = Recorded(manager), Recorded(manager)
    for number in range(4):
        committed(manager, [number] * 8)
        for each in both:
            each.step()


def test_a_block_that_a_fork_was_shortened_in_counts_its_longest_use() -> None:
    manager = BlockManager(16, 4)
    recorded, parent = Recorded(manager), manager.allocate(7)
    child = manager.fork(parent)
    manager.truncate(child, 2)
    recorded.step()
    assert recorded.state.counts.tokens == 7
    manager.free(parent)
    recorded.step()
    assert recorded.state.counts.tokens == 2


def test_a_recording_is_complete_once_it_is_closed(tmp_path: Path) -> None:
    manager = BlockManager(16, 4, null_block=True)
    with Recorder.open(tmp_path / "run.jsonl", manager, MANAGER) as recorder:
        manager.allocate(9)
        recorder.step()
        manager.allocate(1)
        recorder.step()
    recording = Recording(tmp_path / "run.jsonl")
    assert (recording.header.block_size, recording.header.num_reserved) == (4, 1)
    state = ReplayedState(recording.header)
    assert not recording.is_complete
    for step in recording:
        state.apply(step)
    assert recording.is_complete
    assert [each.lengths for each in state.sequences.values()] == [[9], [1]]


def test_an_error_ends_the_recording_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = BlockManager(16, 4)
    recorder = Recorder.open(tmp_path / "run.jsonl", manager, MANAGER)
    recorder.step()
    monkeypatch.setattr(recorder._changes, "look", lambda: 1 / 0)
    for _ in range(3):
        recorder.step()
    recorder.close()
    assert [record.message for record in caplog.records] == [
        f"recording {tmp_path / 'run.jsonl'} ends here: ZeroDivisionError('division by zero')"
    ]
    recording = Recording(tmp_path / "run.jsonl")
    assert len(list(recording)) == 1
    assert not recording.is_complete


def test_other_managers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="record: object cannot be recorded"):
        Recorder.open(tmp_path / "run.jsonl", object(), MANAGER)  # type: ignore[arg-type]
    assert not (tmp_path / "run.jsonl").exists()


def test_another_manager_takes_the_place_of_one_that_is_gone() -> None:
    first, second = BlockManager(16, 4), BlockManager(6, 4)
    recorded = Recorded(first)
    committed(first, [*range(12)])
    first.allocate([*range(12), 7])
    first.allocate(5)
    recorded.step()
    committed(second, [*range(8)])
    second.allocate(9)
    recorded.manager = second
    recorded.recorder.follow(second)
    assert recorded.step().end == (0, 1)
