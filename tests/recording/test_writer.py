"""The file of a recording: what is overwritten, and what happens if it cannot be written."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvpager.recording import writer as writing
from kvpager.recording.format import Header, encoded
from kvpager.recording.reader import Recording
from kvpager.recording.writer import RecordingWriter

HEADER = Header("0", "manager", "paged", 0.0, 4, 8)
STEP = b'{"step":0,"t":0}\n'
POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes, links and locks of POSIX")


def write_one(path: Path) -> None:
    writer = RecordingWriter(path, HEADER)
    writer.write(STEP)
    writer.close()


def test_an_empty_file_or_an_earlier_recording_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.touch()
    for _ in range(2):
        write_one(path)
        assert len(list(Recording(path))) == 1


def test_another_file_is_refused_and_kept(tmp_path: Path) -> None:
    (path := tmp_path / "notes.txt").write_text("mine\n")
    with pytest.raises(ValueError, match=r"record='.*notes.txt': the file exists and is not a rec"):
        RecordingWriter(path, HEADER)
    assert path.read_text() == "mine\n"


@POSIX
def test_pipes_folders_and_missing_folders_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        RecordingWriter(tmp_path / "pipe", HEADER)
    with pytest.raises(IsADirectoryError):
        RecordingWriter(tmp_path, HEADER)
    with pytest.raises(FileNotFoundError):
        RecordingWriter(tmp_path / "missing" / "run.jsonl", HEADER)


@POSIX
def test_two_writers_of_a_file_are_refused(tmp_path: Path) -> None:
    first = RecordingWriter(tmp_path / "run.jsonl", HEADER)
    with pytest.raises(ValueError, match="another engine writes this file"):
        RecordingWriter(tmp_path / "run.jsonl", HEADER)
    first.close()
    write_one(tmp_path / "run.jsonl")


@POSIX
def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    write_one(tmp_path / "run.jsonl")
    assert stat.S_IMODE((tmp_path / "run.jsonl").stat().st_mode) == 0o600


def test_a_full_disk_ends_the_recording_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = RecordingWriter(tmp_path / "run.jsonl", HEADER)

    def write(file: int, data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.os, "write", write)
    writer.write(STEP)
    writer.close()
    writer.write(STEP)
    monkeypatch.undo()
    assert not writer.is_open
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text
    assert list(Recording(tmp_path / "run.jsonl")) == []


def test_a_disk_that_is_too_slow_ends_the_recording(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "_WAITING_BYTES_MAX", 100)
    monkeypatch.setattr(writing, "_INTERVAL_S", 1000.0)
    writer = RecordingWriter(tmp_path / "run.jsonl", HEADER)
    for step in range(20):
        writer.write(encoded({"step": step, "t": 0}))
    assert not writer.is_open
    writer.close()
    assert len(caplog.records) == 1
    assert "slower" in caplog.text
    list(Recording(tmp_path / "run.jsonl"))


FORK = """
import sys
from pathlib import Path
from kvpager.recording.writer import RecordingWriter
from tests.recording.test_writer import HEADER, STEP
from tests.support.forks import in_a_fork

writer = RecordingWriter(Path(sys.argv[1]), HEADER)

def child():
    assert not writer.is_open
    writer.write(STEP)
    writer.close()

with writer._lock:
    in_a_fork(child)
writer.write(STEP)
writer.close()
"""


@POSIX
def test_a_fork_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK, path], check=True, timeout=100)
    assert len(list(Recording(path))) == 1


FORK_THAT_LIVES_ON = """
import os
import sys
from pathlib import Path
from kvpager.recording.writer import RecordingWriter
from tests.recording.test_writer import HEADER

writer = RecordingWriter(Path(sys.argv[1]), HEADER)
reader, end = os.pipe()
if not (child := os.fork()):
    os.close(end)
    os.read(reader, 1)
    os._exit(0)
writer.close()
RecordingWriter(Path(sys.argv[1]), HEADER).close()
os.close(end)
os.waitpid(child, 0)
"""


@POSIX
def test_a_fork_that_lives_on_does_not_keep_the_file(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK_THAT_LIVES_ON, tmp_path / "run.jsonl"]
    subprocess.run(command, check=True, timeout=100)
