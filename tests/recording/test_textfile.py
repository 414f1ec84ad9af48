"""Untrusted files are read within bounds."""

from __future__ import annotations

import gzip
import json
import os
import socket
from pathlib import Path

import pytest

from kvpager.recording import textfile
from kvpager.simulate import replay
from kvpager.simulate.generate import generate_trace
from kvpager.simulate.replay import read_trace
from tests.simulate.test_replay import line

POSIX = pytest.mark.skipif(os.name != "posix", reason="devices and pipes as files")


@POSIX
@pytest.mark.parametrize("path", ["/dev/zero", "/dev/urandom", "/dev/null", "/dev"])
def test_a_device_or_folder_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path}: expected a regular file"):
        read_trace(path)


@POSIX
def test_a_pipe_without_a_writer_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "trace.jsonl")
    with pytest.raises(ValueError, match="expected a regular file"):
        read_trace(pipe)


@POSIX
def test_links_to_devices_are_refused_but_links_to_files_read(tmp_path: Path) -> None:
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="expected a regular file"):
        read_trace(tmp_path / "zero")
    (tmp_path / "trace").write_text(line([1]))
    (tmp_path / "link").symlink_to(tmp_path / "trace")
    assert len(read_trace(tmp_path / "link").prompts) == 1


@POSIX
def test_a_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises((OSError, ValueError)):
            read_trace(tmp_path / "socket")


@pytest.mark.parametrize("name", ["trace", "trace.gz"])
def test_an_endless_line_is_refused(tmp_path: Path, name: str, monkeypatch) -> None:
    monkeypatch.setattr(textfile, "LINE_BYTES_MAX", 100)
    content = (line([1]) + "\n").encode() + bytes(101)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match="line 2: longer than 100 bytes"):
        read_trace(tmp_path / name, skip_bad=True)


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    """A small archive decompresses to one line of 64 MiB of zeros."""
    (tmp_path / "trace.gz").write_bytes(gzip.compress(bytes(2**26)))
    assert (tmp_path / "trace.gz").stat().st_size < 2**17
    with pytest.raises(ValueError, match="line 1: longer than 16,777,216 bytes"):
        read_trace(tmp_path / "trace.gz", skip_bad=True)


@pytest.mark.parametrize("bound", ["TEXT_BYTES_MAX", "LINES_MAX"])
def test_endless_blank_lines_are_refused(tmp_path: Path, bound: str, monkeypatch) -> None:
    monkeypatch.setattr(textfile, bound, 50)
    (tmp_path / "trace.gz").write_bytes(gzip.compress(b"\n" * 51))
    with pytest.raises(ValueError, match="Use a part of it"):
        read_trace(tmp_path / "trace.gz", skip_bad=True)
    (tmp_path / "trace.gz").write_bytes(gzip.compress(b"\n" * 50))
    with pytest.raises(ValueError, match="no request in it"):
        read_trace(tmp_path / "trace.gz", skip_bad=True)


def test_reading_stops_after_a_thousand_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"x\n" * 5000)
    with pytest.raises(ValueError, match=r"line 3: .*; and at least 998 more"):
        read_trace(path)


def test_the_number_of_skipped_lines_is_bounded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(replay, "_SKIPPED_MAX", 20)
    path = tmp_path / "trace"
    path.write_text("\n".join([line([1]), *["x"] * 20]))
    assert len(read_trace(path, skip_bad=True).skipped) == 20
    path.write_text("\n".join([line([1]), *["x"] * 21]))
    with pytest.raises(ValueError, match="and at least 18 more"):
        read_trace(path, skip_bad=True)


def test_a_trace_has_a_bounded_number_of_blocks(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(replay, "_BLOCKS_MAX", 10)
    path = tmp_path / "trace"
    path.write_text(f"{line(list(range(10)))}\n")
    assert read_trace(path).num_blocks == 10
    path.write_text(f"{line(list(range(10)))}\n{line([1])}")
    with pytest.raises(ValueError, match="more than 10 blocks"):
        read_trace(path)
    with pytest.raises(ValueError, match=r"num_requests=.*at most 1000000"):
        generate_trace(10**9)


@pytest.mark.parametrize(
    "fields",
    [
        {"timestamp": 10**400},
        {"timestamp": 1e16},
        {"input_length": 2**31},
        {"output_length": 10**30},
    ],
    ids=str,
)
def test_numbers_out_of_range_make_a_bad_line(tmp_path: Path, fields: dict) -> None:
    path = tmp_path / "trace"
    path.write_text(json.dumps({**json.loads(line([1])), **fields}))
    with pytest.raises(ValueError, match=r"line 1: .*expected a number, at least 0 and at most"):
        read_trace(path)
