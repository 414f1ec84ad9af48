"""The data of a report: what a recording says, reduced to the shown steps."""

from __future__ import annotations

import base64
import json
import re
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvpager.recording.format import Header, encoded, encoded_header
from kvpager.recording.reader import Recording
from kvpager.recording.replay import ReplayedState
from kvpager.report import writer
from kvpager.report.cells import CELLS_MAX, PLANES, Blocks, Grid
from kvpager.report.moments import shown_steps
from kvpager.report.reserved import ReservedPool
from kvpager.report.writer import BYTES_MAX, report, write_report
from tests.support.recordings import write_recording

POOL = Header("0.1.0", "engine", "paged", 0.0, 4, 8, max_tokens=16, tiers=("disk",))


def recorded(path: Path, *steps: dict[str, Any], header: Header = POOL) -> Path:
    lines = [{"step": number, "t": number / 10, **each} for number, each in enumerate(steps)]
    text = b"".join(map(encoded, [*lines, {"closed": len(lines)}]))
    path.write_bytes(encoded_header(header) + text)
    return path


def unpacked(html: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """The figures of a page, and its planes: uint8 [side, plane, frame, cell], reserved first."""
    data = re.search(rb'id="data">([^<]*)<', html)
    assert data is not None
    packed = zlib.decompress(base64.b64decode(data[1]))
    (length,) = struct.unpack_from("<I", packed)
    run = json.loads(packed[4 : 4 + length])
    shape = (2, len(PLANES), len(run["frames"]["step"]), run["numCells"])
    planes = np.frombuffer(packed[4 + length :], np.uint8).reshape(shape)
    return run, np.bitwise_xor.accumulate(planes, axis=2)


TWO_REQUESTS = (
    {
        "new": [[0, 6, 9, 1], [1, 7, 9, 1]],
        "state": [[0, "running"], [1, "running"]],
        "begin": [[0, 0, 0], [1, 1, 4]],
        "len": [[0, 6], [1, 7]],
        "blocks": [[0, 0, 0, [0, 1]], [1, 0, 0, [0, 2]]],
        "cached": [[-1, 0], [-1, 5]],
        "prefill": [[0, 0, 6], [1, 4, 3]],
        "counts": [3, 1, 0, 4, 0, 9],
    },
    {"decode": [0, 1], "counts": [3, 1, 0, 4, 0, 11], "tiers": [[2, 30, 70]]},
    {
        "end": [0],
        "decode": [],
        "state": [[0, "finished"], [1, "swapped"]],
        "blocks": [[1, 0, 0, [0, -2]]],
    },
)


@pytest.fixture
def two_requests(tmp_path: Path) -> tuple[dict[str, Any], np.ndarray]:
    file = recorded(tmp_path / "run.jsonl", *TWO_REQUESTS, header=POOL._replace(num_host_blocks=1))
    return unpacked(report(file))


def test_each_block_has_its_tokens_holders_and_request(two_requests) -> None:
    _, planes = two_requests
    live, held, cached, holders, owner = planes[1, :5, 0]
    assert live.tolist() == [4, 2, 3, 0, 0, 0, 0, 0]
    assert held.tolist() == [4, 4, 4, 0, 0, 0, 0, 0]
    assert cached.tolist() == [0, 0, 0, 0, 0, 4, 0, 0]
    assert holders.tolist() == [2, 1, 1, 0, 0, 0, 0, 0]
    assert owner.tolist() == [0, 1, 2, 0, 0, 0, 0, 0]  # request + 1; the shared block has none


def test_all_blocks_of_a_long_run_are_those_of_its_replay(tmp_path: Path) -> None:
    file = write_recording(tmp_path / "run.jsonl", num_steps=120, every=1.2)
    run, planes = unpacked(report(file))
    recording = Recording(file)
    state = ReplayedState(recording.header)
    swapped = shared = 0
    for step in recording:
        state.apply(step)
        holders, filled = state.holders(), state.filled()
        live, held, cached, counted = planes[1, :4, step.step].tolist()
        assert {block: count for block, count in enumerate(counted) if count} == {
            block: len(found) for block, found in holders.items()
        }
        assert {block: live[block] for block in filled} == filled
        assert sum(live) == state.counts.tokens
        assert sum(held) == 16 * state.counts.held
        assert sum(cached) == 16 * state.counts.cached
        swapped += state.counts.host
        shared += run["frames"]["saved"][step.step]
    assert swapped
    assert shared


def test_reserved_regions_hold_the_same_tokens_without_sharing(two_requests) -> None:
    run, planes = two_requests
    assert planes[0, 0, 1].tolist() == [4, 3, 0, 0, 4, 4, 0, 0]
    assert planes[0, 1, 1].tolist() == [4] * 8
    assert run["reserved"]["running"] == [2, 2, 1]
    assert run["reserved"]["tokens"] == [13, 15, 8]


def test_a_request_without_a_sequence_waits_on_both_sides(tmp_path: Path) -> None:
    steps = ({**TWO_REQUESTS[0], "new": [[0, 6, 9, 1], [1, 7, 9, 1], [2, 5, 5, 1]]},)
    run, _ = unpacked(report(recorded(tmp_path / "r.jsonl", *steps)))
    assert (run["frames"]["queued"], run["frames"]["running"]) == ([1], [2])


def test_numbers_count_requests_that_never_had_a_region(tmp_path: Path) -> None:
    header = POOL._replace(max_tokens=32, num_host_blocks=1)  # one region
    run, _ = unpacked(report(recorded(tmp_path / "r.jsonl", *TWO_REQUESTS[:2], header=header)))
    rows = {name: (reserved, paged) for name, reserved, paged, _ in run["numbers"]}
    assert rows["requests that never had a region"] == ("1 of 2", "")
    assert rows["most requests at once"] == ("1", "2")
    assert rows["taken memory that holds tokens"] == ("20.3%", "83.3%")  # 13 of 64, 20 of 24


def test_a_life_lists_its_states_with_their_steps(two_requests) -> None:
    run, _ = two_requests
    finished, swapped = run["lives"]
    assert finished["segments"] == [["prefill", 0, 1, 0, 6, 1], ["decode", 1, 2]]
    assert (finished["end"], finished["last"]) == ("finished", 2)
    assert (swapped["end"], swapped["cached"], swapped["note"]) == (None, 4, "swapped")


def test_the_tree_names_the_sequences_that_share_a_run(two_requests) -> None:
    run, _ = two_requests
    node = {"parent": -1, "blocks": 1, "holders": 2, "requests": [0, 1]}
    assert run["frames"]["tree"] == [[node], [node], []]
    assert run["frames"]["saved"] == [1, 1, 0]


def test_a_branch_of_the_tree_follows_what_more_sequences_share(tmp_path: Path) -> None:
    tables = [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5], [6], [7], [7]]
    step = {
        "begin": [[number, None, 0] for number in range(6)],
        "blocks": [[number, 0, 0, table] for number, table in enumerate(tables)],
    }
    run, _ = unpacked(report(recorded(tmp_path / "r.jsonl", step, header=POOL)))
    assert [(n["parent"], n["blocks"], n["holders"]) for n in run["frames"]["tree"][0]] == [
        (-1, 2, 3),
        (0, 1, 2),
        (-1, 1, 2),
    ]


def test_sequences_with_equal_tables_are_all_named(tmp_path: Path) -> None:
    step = {
        "new": [[number, 8, 1, 1] for number in range(3)],
        "begin": [[number, number, 0] for number in range(3)],
        "blocks": [[number, 0, 0, [0, 1]] for number in range(3)],
    }
    run, _ = unpacked(report(recorded(tmp_path / "r.jsonl", step)))
    (node,) = run["frames"]["tree"][0]
    assert (node["blocks"], node["holders"], node["requests"]) == (2, 3, [0, 1, 2])


def test_pinned_blocks_count_as_cached(tmp_path: Path) -> None:
    run, _ = unpacked(report(recorded(tmp_path / "r.jsonl", {"counts": [0, 2, 3, 3, 0, 0]})))
    assert run["frames"]["cached"] == [5]


def test_tier_traffic_is_kept_for_each_shown_step(two_requests) -> None:
    run, _ = two_requests
    (tier,) = run["traffic"]
    assert (tier["name"], tier["inwards"], tier["outwards"]) == ("disk", [0, 30, 30], [0, 70, 70])


def test_reserved_pool_admits_in_order_and_remembers_those_it_served() -> None:
    pool = ReservedPool(num_blocks=9, region_blocks=4, block_size=2)
    for sequence in range(4):
        pool.begin(sequence)
    assert (list(pool.regions), list(pool.waiting)) == ([0, 1], [2, 3])
    pool.end(2)
    pool.end(0)
    assert pool.regions == {1: 1, 3: 0}
    assert pool.served == {0, 1, 3}
    blocks = pool.blocks({1: 5, 3: 99}, {1: 7, 3: 8})
    assert blocks.live.tolist() == [2, 2, 2, 2, 2, 2, 1, 0, 0]
    assert blocks.owners.tolist() == [9, 9, 9, 9, 8, 8, 8, 8, 0]


def test_without_a_maximum_a_region_is_as_long_as_the_longest_sequence(tmp_path: Path) -> None:
    header = POOL._replace(max_tokens=None, num_host_blocks=1)
    run, _ = unpacked(report(recorded(tmp_path / "r.jsonl", *TWO_REQUESTS, header=header)))
    assert run["reserved"]["isLongest"]
    assert run["reserved"]["maxTokens"] == 8
    assert run["reserved"]["regions"] == 4


def test_a_region_larger_than_any_memory_takes_none(tmp_path: Path) -> None:
    steps = ({"begin": [[0, 0, 0]], "len": [[0, 2**31 - 1]]},)
    header = POOL._replace(max_tokens=None, block_size=1)
    tracemalloc.start()
    run, _ = unpacked(report(recorded(tmp_path / "r.jsonl", *steps, header=header)))
    _, most_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert run["reserved"]["regions"] == 0
    assert most_bytes < 64 * 2**20


def test_samples_of_a_swapped_request_do_not_run(tmp_path: Path) -> None:
    begun = [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    steps = (
        {"new": [[0, 5, 5, 3], [1, 5, 5, 2]], "state": [[0, "running"]], "begin": begun},
        {"state": [[0, "swapped"], [1, "running"]], "begin": [[3, 1, 0], [4, 1, 0]]},
        {"state": [[0, "running"]], "end": [3, 4]},
    )
    run, _ = unpacked(report(recorded(tmp_path / "r.jsonl", *steps)))
    assert run["frames"]["running"] == [3, 2, 3]
    rows = {name: paged for name, _, paged, _ in run["numbers"]}
    assert rows["most requests at once"] == "3"


def test_a_cell_of_several_blocks_adds_them_up() -> None:
    grid = Grid(2 * CELLS_MAX + 1, 10)
    assert (grid.cell_blocks, grid.num_cells) == (3, 683)
    zeros = np.zeros(grid.num_blocks, np.int64)
    live, held, holders, owners = (zeros.copy() for _ in range(4))
    live[:3], held[:2], holders[:3], owners[:3] = (10, 5, 0), 10, 1, (300, 5, 300)
    holders[3:6], held[3:6] = (2, 7, 1), 10
    holders[6:9], held[6:9] = (1, 1, 2), 10  # most are not shared
    planes = grid.cells(Blocks(live, held, zeros, holders, owners))
    assert planes[:2, 0].tolist() == [32, 43]  # half of 64 parts, and two thirds
    assert planes[3, :4].tolist() == [1, 7, 1, 0]
    assert planes[4:, 0].tolist() == [300 % 256, 1, 0]  # the request with the most blocks


def test_null_block_is_not_on_the_map(tmp_path: Path) -> None:
    step = {"begin": [[0, None, 0]], "blocks": [[0, 0, 0, [1]]], "len": [[0, 2]]}
    header = POOL._replace(num_reserved=1)
    run, planes = unpacked(report(recorded(tmp_path / "r.jsonl", step, header=header)))
    assert (run["numBlocks"], run["firstBlock"]) == (7, 1)
    assert planes[1, 0, 0].tolist() == [2, 0, 0, 0, 0, 0, 0]


def test_a_pool_that_grows_is_drawn_at_its_largest(tmp_path: Path) -> None:
    file = recorded(tmp_path / "r.jsonl", {}, {"num_blocks": 12}, {"num_blocks": 10})
    run, _ = unpacked(report(file))
    assert (run["numBlocks"], run["grew"]) == (12, True)
    assert run["frames"]["cells"] == [8, 12, 10]


@pytest.mark.parametrize(("steps", "frames", "first"), [(1, 9, [0]), (3, 9, [0, 1, 2])])
def test_a_short_run_is_shown_whole(steps: int, frames: int, first: list[int]) -> None:
    assert shown_steps(steps, frames) == first


def test_a_long_run_shows_its_first_and_last_step() -> None:
    shown = shown_steps(100_001, 5)
    assert shown == [0, 25_000, 50_000, 75_000, 100_000]


def test_page_is_small_and_the_same_each_time(tmp_path: Path) -> None:
    file = write_recording(tmp_path / "run.jsonl")
    size = write_report(file, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_bytes()
    assert size == len(html) < BYTES_MAX
    assert html == report(file)
    assert html.count(b"http") == html.count(b"http-equiv") + html.count(b"http://www.w3.org/2000")


def test_page_that_would_be_too_large_shows_fewer_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_recording(tmp_path / "run.jsonl")
    whole = report(file)
    monkeypatch.setattr(writer, "BYTES_MAX", len(whole) - 1)
    smaller = report(file)
    assert len(smaller) < len(whole)
    steps = unpacked(smaller)[0]["frames"]["step"]
    assert (steps[:2], steps[-1]) == ([0, 2], 59)


def test_names_in_a_recording_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    file = write_recording(tmp_path / "run.jsonl", num_steps=3, model=evil)
    html = report(file)
    assert html.count(b"<script") == 2
    assert b"alert" not in html
    assert unpacked(html)[0]["model"] == evil


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "line 1: not JSON"),
        (b"\x00\xff\n", "line 1: not JSON"),
        (encoded_header(POOL), "line 2: expected a step, the recording has none"),
        (encoded_header(POOL) + b'{"step":0}\n', "line 2: a step lacks its number or its time"),
        (encoded_header(POOL._replace(num_blocks=10**9)), "line 1: num_blocks=1000000000"),
        (encoded_header(POOL._replace(num_blocks=1, num_reserved=1)), "line 1: num_blocks=1"),
        (encoded_header(POOL) + b'{"step":0,"t":0,"num_blocks":1000000000}\n', "line 2: num_bl"),
        (encoded_header(POOL) + b'{"step":0,"t":0,"\\u006eum_blocks":9}\n', "line 2: num_blocks=9"),
    ],
)
def test_bad_recording_is_refused_with_its_line(tmp_path: Path, text: bytes, message: str) -> None:
    file = tmp_path / "run.jsonl"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        report(file)


def test_oddly_written_steps_are_read(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    odd = b'{"\\u0073tep":0,"t":0}\n{"\\u0073tep":1,"t":1,"num_blocks"  :  9}\n'
    file.write_bytes(encoded_header(POOL) + odd)
    assert unpacked(report(file))[0]["numBlocks"] == 9


def test_run_that_crashed_says_so(tmp_path: Path) -> None:
    file = write_recording(tmp_path / "run.jsonl", num_steps=4, closed=False)
    with file.open("ab") as opened:
        opened.write(b'{"step":4,"t":')
    with pytest.warns(UserWarning, match="is cut"):
        run, _ = unpacked(report(file))
    assert not run["complete"]
    assert run["frames"]["step"] == [0, 1, 2, 3]
