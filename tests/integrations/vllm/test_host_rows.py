"""Rows of memory that the scheduler and the workers of an engine share."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.vllm_parts import HostRows


def rows_of(folder: Path, num_rows: int = 3, processes: int = 2) -> HostRows:
    return HostRows("engine", num_rows, 4096, num_processes=processes, folder=str(folder))


def test_what_one_writes_the_other_reads(tmp_path: Path) -> None:
    scheduler, worker = rows_of(tmp_path), rows_of(tmp_path)
    worker.rows[1, 7] = 5
    assert scheduler.rows.shape == (3, 4096)
    assert scheduler.rows[1, 7] == 5


def test_the_name_is_gone_when_all_have_come(tmp_path: Path) -> None:
    scheduler = rows_of(tmp_path)
    assert not scheduler.is_complete
    assert len(os.listdir(tmp_path)) == 1
    worker = rows_of(tmp_path)
    assert scheduler.is_complete
    assert worker.is_complete
    assert os.listdir(tmp_path) == []


def test_two_engines_of_one_name_share_nothing(tmp_path: Path) -> None:
    first = [rows_of(tmp_path), rows_of(tmp_path)]
    second = [rows_of(tmp_path), rows_of(tmp_path)]
    first[0].rows[:] = 1
    assert not second[0].rows.any()


def test_rows_of_an_engine_that_died_are_made_anew(tmp_path: Path) -> None:
    dead = rows_of(tmp_path)
    dead.rows[:] = 1
    dead._finalizer.detach()  # as if it were killed
    del dead
    assert len(os.listdir(tmp_path)) == 1
    scheduler = rows_of(tmp_path, num_rows=5)
    assert not scheduler.rows.any()
    assert not scheduler.is_complete
    assert rows_of(tmp_path, num_rows=5).is_complete


def test_an_engine_that_ends_at_its_start_leaves_no_file(tmp_path: Path) -> None:
    scheduler = rows_of(tmp_path)
    del scheduler
    assert os.listdir(tmp_path) == []


def test_rows_of_another_size_are_refused(tmp_path: Path) -> None:
    scheduler = rows_of(tmp_path)
    with pytest.raises(ValueError, match="another process shares rows of another size"):
        rows_of(tmp_path, num_rows=4)
    assert not scheduler.is_complete


def test_a_folder_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(MemoryError, match=r"host_memory: 12.0 KiB do not fit .* --shm-size"):
        rows_of(tmp_path)
    assert os.listdir(tmp_path) == []
