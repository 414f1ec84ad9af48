"""Recordings from anywhere: one clear error, which names the line, in bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpager.recording import replay, textfile
from kvpager.recording.format import STATES, Header, encoded, encoded_header, parse_line
from kvpager.recording.reader import Recording
from kvpager.recording.replay import ReplayedState

HEADER = Header("0", "engine", "paged", 5.0, 4, 8, num_host_blocks=2, tiers=("host",))
FIRST: dict[str, Any] = {
    "step": 0,
    "t": 0.5,
    "new": [[0, 5, 3, 1]],
    "state": [[0, "running"]],
    "begin": [[0, 0, 0], [1, None, 0]],
    "len": [[0, 5], [1, 4]],
    "blocks": [[0, 0, 0, [0, 1]], [1, 0, 0, [2]]],
    "cached": [[-1, 2]],
}


def saved(tmp_path: Path, *lines: bytes | dict[str, Any]) -> Path:
    path = tmp_path / "run.jsonl"
    path.write_bytes(b"".join(each if isinstance(each, bytes) else encoded(each) for each in lines))
    return path


def replayed(path: Path) -> ReplayedState:
    recording = Recording(path)
    state = ReplayedState(recording.header)
    for step in recording:
        state.apply(step)
    return state


def header(**changes: Any) -> dict[str, Any]:
    return json.loads(encoded_header(HEADER)) | changes


def test_a_recording_may_be_gzipped(tmp_path: Path) -> None:
    (path := tmp_path / "run.jsonl.gz").write_bytes(
        gzip.compress(encoded_header(HEADER) + encoded(FIRST) + encoded({"closed": 1}))
    )
    recording = Recording(path)
    assert recording.header == HEADER
    assert [step.state for step in recording] == [((0, "running"),)]
    assert recording.is_complete


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (b"", "not JSON"),
        (b"\x00\xff\x80\n", "not JSON"),
        (b'{"step":0,"t":0}\n', "Is this a recording?"),
        (b"[]\n", "expected an object, got list"),
        (b"[" * 100_000, "nested too deep"),
        (header(version=2), "version 2: this kvpager reads version 1"),
        (header(num_blocks=10**9), "num_blocks=1000000000: expected an int from 1 to 16,777,216"),
        (header(block_size=0), "block_size=0"),
        (header(block_size=True), "block_size=True"),
        (header(windows=[-1]), "windows="),
        (header(source="elsewhere"), "expected one of engine, patch"),
        (header(model="\x1b[2J"), "printable"),
        (header(more=1), "'more': no key of version 1"),
        ({"format": "kvpager-recording", "version": 1}, "the header lacks kvpager, source"),
    ],
)
def test_a_bad_header_is_line_1(tmp_path: Path, first: Any, message: str) -> None:
    with pytest.raises(ValueError, match="line 1: ") as caught:
        Recording(saved(tmp_path, first))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("third", "message"),
    [
        (b"\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b'{"step":1,"t":NaN}\n', "NaN is no number"),
        (b'{"step":1,"t":1e999}\n', "t=inf: expected seconds"),
        (b'{"step":1,"t":-1}\n', "t=-1: expected seconds"),
        (b'{"step":1,"t":0.1}\n', "t=0.1: the step before has t=0.5"),
        (b'{"step":' + b"9" * 5000 + b',"t":1}\n', "not JSON"),
        (header(), "a second header"),
        ({"t": 1}, "lacks its number"),
        ({"step": 2, "t": 1}, "step=2: expected 1"),
        ({"step": 1.0, "t": 1}, "step=1.0: expected an int"),
        ({"closed": 7}, "closed=7, after 1 steps"),
        ({"step": 1, "t": 1, "tokens": [1]}, "'tokens': no key of version 1"),
        ({"step": 1, "t": 1, "end": [-1]}, "end=[-1]: expected an int from 0"),
        ({"step": 1, "t": 1, "end": 3}, "end=3: expected a list"),
        ({"step": 1, "t": 1, "end": [True]}, "end=[True]"),
        ({"step": 1, "t": 1, "end": [2**31]}, "expected an int from 0 to 2,147,483,647"),
        ({"step": 1, "t": 1, "begin": [[1, 2]]}, "expected a list of another shape"),
        ({"step": 1, "t": 1, "blocks": [[0, 0, 0]]}, "expected a list of another shape"),
        ({"step": 1, "t": 1, "blocks": [[0, 0, 0, ["1"]]]}, "expected an int"),
        ({"step": 1, "t": 1, "len": [[1]]}, "expected [sequence, tokens]"),
        ({"step": 1, "t": 1, "cached": [[1]]}, "a parent and at least one block"),
        ({"step": 1, "t": 1, "state": [[0, "lost"]]}, "expected one of queued"),
        ({"step": 1, "t": 1, "state": [[0, []]]}, "expected one of queued"),
        ({"step": 1, "t": 1, "counts": [1, 2]}, "expected a list of another shape"),
        ({"step": 1, "t": 1, "tiers": [[None, -1, 0]]}, "expected an int from 0"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, third: Any, message: str) -> None:
    path = saved(tmp_path, encoded_header(HEADER), FIRST, third, {"step": 2, "t": 2})
    with pytest.raises(ValueError, match="line 3: ") as caught:
        list(Recording(path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"end": [7]}, "sequence 7 is not live"),
        ({"end": [0], "len": [[0, 6]]}, "sequence 0 is not live"),
        ({"decode": [5]}, "sequence 5 is not live"),
        ({"decode": [0, 1, 0]}, "decode: a sequence is listed twice"),
        ({"begin": [[1, None, 0]]}, "begin: sequence 1, expected 2"),
        ({"blocks": [[0, 0, 3, [1]]]}, "sequence 0 keeps 3 of 2 blocks"),
        ({"blocks": [[0, 0, 0, [8]]]}, "block 8: the pool has 8"),
        ({"blocks": [[0, 0, 0, [-4]]]}, "block -4: there are 2 host blocks"),
        ({"blocks": [[0, 1, 0, [1]]]}, "group 1: the header has 1"),
        ({"len": [[0, 1, 63]]}, "group 63: the header has 1"),
        ({"uncached": [5]}, "block 5 is not cached"),
        ({"cached": [[1, 3]]}, "block 1, the parent of 3, is not cached"),
        ({"cached": [[2, 2]]}, "block 2, the parent of 2, is not cached"),
        ({"new": [[0, 1, 1, 1]]}, "new: request 0, expected at least 1"),
        ({"state": [[3, "running"]]}, "request 3 is not live"),
        ({"num_blocks": 2, "blocks": [[0, 0, 0, [2]]]}, "block 2: the pool has 2"),
    ],
)
def test_a_step_that_does_not_follow_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = saved(tmp_path, encoded_header(HEADER), FIRST, {"step": 1, "t": 1, **changes})
    with pytest.raises(ValueError, match="line 3: ") as caught:
        replayed(path)
    assert message in str(caught.value)


def test_sequences_take_a_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "TABLES_MAX", 5)
    first = encoded_header(HEADER._replace(windows=(None, 8)))
    fits = {"step": 0, "t": 0, "begin": [[0, None, 0], [1, None, 0]]}
    replayed(saved(tmp_path, first, fits))
    more = {"step": 1, "t": 1, "begin": [[2, None, 0]]}
    with pytest.raises(ValueError, match="line 3: begin: more than 5 tables"):
        replayed(saved(tmp_path, first, fits, more))


def test_a_crashed_run_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    path = saved(tmp_path, encoded_header(HEADER), FIRST, b'{"step":1,"t":1,"end":[')
    recording = Recording(path)
    with pytest.warns(UserWarning, match="line 3 is cut, and ignored"):
        assert len(list(recording)) == 1
    assert not recording.is_complete


def test_nothing_follows_the_end(tmp_path: Path) -> None:
    path = saved(tmp_path, encoded_header(HEADER), {"closed": 0}, FIRST)
    with pytest.raises(ValueError, match="line 3: the recording has ended before"):
        list(Recording(path))


def test_a_huge_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfile, "LINE_BYTES_MAX", 1000)
    path = saved(tmp_path, encoded_header(HEADER), FIRST, b" " * 2000)
    with pytest.raises(ValueError, match="line 3: longer than 1,000 bytes"):
        list(Recording(path))


NUMBERS = st.integers(-3, 12) | st.sampled_from([2**31, 2**63, -1])
VALUES = st.recursive(
    NUMBERS | st.none() | st.booleans() | st.floats() | st.sampled_from(STATES),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(["step", "t", *FIRST, "end", "decode", "uncached", "counts", "num_blocks"])


@settings(max_examples=200, deadline=None)
@given(steps=st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=4))
def test_any_line_is_a_step_or_a_value_error(steps: list[dict[str, Any]]) -> None:
    state = ReplayedState(HEADER)
    state.apply(parse_line(encoded(FIRST), 2))  # type: ignore[arg-type]
    for number, fields in enumerate(steps, 1):
        try:
            state.apply(parse_line(encoded({"step": number, "t": 1.0, **fields}), number))  # type: ignore[arg-type]
        except ValueError:
            return
        state.holders()


@settings(max_examples=100, deadline=None)
@given(at=st.integers(0, 400), byte=st.integers(0, 255))
def test_a_damaged_byte_gives_a_value_error_or_a_recording(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    text = bytearray(encoded_header(HEADER) + encoded(FIRST) + encoded({"closed": 1}))
    text[at % len(text)] = byte
    (path := tmp_path_factory.getbasetemp() / "damaged.jsonl").write_bytes(text)
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        replayed(path)
