"""`kvpager top`: the blocks, requests and rates of a recording or of a running engine."""

from __future__ import annotations

import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvpager.cli import top as command
from kvpager.cli.app import app
from kvpager.engine.recording import Record
from kvpager.recording.format import BLOCKS_MAX, Header, Step, encoded, encoded_header
from kvpager.recording.reader import Recording
from kvpager.top.recorded import Player
from kvpager.top.scraped import Scraper
from kvpager.top.screen import drawn
from kvpager.top.view import Cell, Kind, Row, View
from tests.support.toy_runner import ToyEngine

HEADER = Header("0", "engine", "paged", 5.0, 4, 6, model="Toy", tiers=("disk",))
FIRST: dict[str, Any] = {
    "step": 0,
    "t": 1.0,
    "cached": [[-1, 0], [-1, 3]],
    "begin": [[0, 0, 0], [1, 1, 4]],
    "len": [[0, 6], [1, 5]],
    "blocks": [[0, 0, 0, [0, 1]], [1, 0, 0, [0, 2]]],
    "new": [[0, 6, 9, 1], [1, 5, 2, 1], [2, 3, 4, 1]],
    "state": [[0, "running"], [1, "running"]],
    "prefill": [[0, 0, 6], [1, 4, 1]],
    "counts": [3, 1, 0, 2, 0, 7],
    "totals": [0, 2, 0, 0, 11, 4],
    "tiers": [[7, 1024, 2048]],
}
SECOND: dict[str, Any] = {"step": 1, "t": 1.5, "decode": [0, 1]}


def saved(tmp_path: Path, *lines: dict[str, Any], header: Header = HEADER) -> Path:
    (path := tmp_path / "run.jsonl").write_bytes(
        encoded_header(header) + b"".join(map(encoded, lines))
    )
    return path


def played(path: Path) -> Player:
    recording = Recording(path)
    player = Player(recording.header)
    for step in recording:
        player.apply(step)
    return player


def top(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["top", *arguments])


# -------------------------------------------------------------------- recordings


def test_a_recording_shows_who_holds_which_block(tmp_path: Path) -> None:
    view = played(saved(tmp_path, FIRST, SECOND)).view(cells_max=100)
    held = [Cell(Kind.SHARED), Cell(Kind.HELD, 0), Cell(Kind.HELD, 1)]
    assert view.cells == (*held, Cell(Kind.CACHED), Cell(Kind.FREE), Cell(Kind.FREE))
    assert view.rows == (
        Row(0, "running", 7, 15, 2, 1),
        Row(1, "running", 6, 7, 2, 1),
        Row(2, "queued", 0, 7, 0, 0),
    )
    assert view.requests["queued"] == 1
    assert view.rates == {"tokens": 4.0, "steps": 2.0}


def test_many_blocks_share_a_cell_that_looks_like_most_of_them(tmp_path: Path) -> None:
    view = played(saved(tmp_path, FIRST)).view(cells_max=2)
    assert view.cell_blocks == 3
    assert [cell.kind for cell in view.cells] == [Kind.SHARED, Kind.FREE]


def test_free_blocks_take_no_time_and_count(tmp_path: Path) -> None:
    header = HEADER._replace(num_blocks=BLOCKS_MAX)
    view = played(saved(tmp_path, FIRST, header=header)).view(cells_max=1000)
    assert view.cell_blocks == 16778
    assert [cell.kind for cell in view.cells] == [Kind.FREE] * 1000
    one = HEADER._replace(num_blocks=4)
    assert played(saved(tmp_path, FIRST, header=one)).view(2).cells[1] == Cell(Kind.HELD, 1)


def test_names_in_a_recording_cannot_become_markup(tmp_path: Path) -> None:
    header = HEADER._replace(model="[red]m[/]", tiers=("[/disk]",))
    done = top(str(saved(tmp_path, FIRST, header=header)), "--once")
    assert done.exit_code == 0, done.output
    assert "[red]m[/]" in done.output
    assert "[/disk]" in done.output


def test_the_last_moment_is_printed_once(tmp_path: Path) -> None:
    done = top(str(saved(tmp_path, FIRST, SECOND)), "--once")
    assert done.exit_code == 0, done.output
    for text in (
        "Toy, paged, 2 steps",
        "3 held, 1 cached",
        "1 queued",
        "▓██░··",
        "disk",
        "2.0 KiB",
    ):
        assert text in done.output


def test_a_recording_is_played_to_its_end(tmp_path: Path) -> None:
    done = top(str(saved(tmp_path, FIRST, SECOND, {"closed": 2})), "--speed=1e6")
    assert done.exit_code == 0, done.output
    assert "2 steps" in done.output


def test_a_recording_may_claim_that_centuries_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(command.time, "sleep", slept.append)
    done = top(str(saved(tmp_path, FIRST, {"step": 1, "t": 1e11})), "--speed", "0.001")
    assert done.exit_code == 0, done.output
    assert slept[1] == 1e6


def test_a_recording_that_is_being_written_is_followed(tmp_path: Path) -> None:
    path = saved(tmp_path, FIRST)
    second, end = encoded(SECOND), encoded({"closed": 2})
    news = [second[:7], second[7:], end]

    def wait() -> bool:
        with path.open("ab") as file:
            file.write(news.pop(0) if news else b"")
        return not recording.is_complete

    recording = Recording(path, wait)
    steps = list(recording)
    assert [step.step for step in steps] == [0, 1]
    assert recording.is_complete


def test_following_shows_what_there_is_and_ends_with_the_recording(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, FIRST)
    news = [encoded(SECOND), encoded({"closed": 2})]

    def sleep(seconds: float) -> None:
        with path.open("ab") as file:
            file.write(news.pop(0) if news else b"")

    monkeypatch.setattr(command.time, "sleep", sleep)
    seen: list[View] = []
    command._follow(str(path), Console(width=80), seen.append)
    assert [view.seconds for view in seen] == [1.0, 1.5, 1.5]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"mine\n", ["--once"], "line 1: not JSON"),
        (encoded_header(HEADER) + b'{"step":5,"t":0}\n', ["--once"], "line 2: step=5: expected 0"),
        (encoded_header(HEADER), ["--once", "--follow"], "--follow: conflicts with --once"),
    ],
)
def test_bad_recordings_are_one_line(
    tmp_path: Path, content: bytes, options: list[str], message: str
) -> None:
    (path := tmp_path / "run.jsonl").write_bytes(content)
    done = top(str(path), *options)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert top(str(tmp_path / "missing"), "--once").exit_code == 2


def test_the_recording_of_an_engine_shows_its_requests(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with ToyEngine(core={"record": Record(path)}) as engine:
        with engine.pause():
            streams = [engine.ask([1, 2, 3, number], 30) for number in range(3)]
        for stream in streams:
            stream.result(60)
    recording, most = Recording(path), 0
    player = Player(recording.header)
    for step in recording:
        assert isinstance(step, Step)
        player.apply(step)
        view = player.view(cells_max=64)
        kinds = [cell.kind for cell in view.cells]
        assert kinds.count(Kind.HELD) + kinds.count(Kind.SHARED) == view.blocks["held"]
        most = max(most, view.requests["running"])
    assert most == 3


# -------------------------------------------------------------------- engines


@pytest.fixture
def answers() -> Iterator[tuple[str, list[bytes]]]:
    """A server on this machine, and what it answers next."""
    bodies: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = bodies.pop(0)
            self.send_response(200 if body else 503)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/metrics", bodies
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_metrics_of_an_engine_are_shown(answers: tuple[str, list[bytes]]) -> None:
    prometheus = pytest.importorskip("prometheus_client")
    from kvpager.engine.metrics import EngineMetrics

    url, bodies = answers
    registry = prometheus.CollectorRegistry()
    with ToyEngine() as engine:
        registry.register(EngineMetrics(engine, prefix="my_engine"))
        scraper = Scraper(url, "my_engine")
        views = []
        for _ in range(2):
            engine.ask([1, 2, 3, 4, 5], 9).result(60)
            bodies.append(prometheus.generate_latest(registry))
            views.append(scraper.view())
        pool = engine.stats().pool
    assert views[0].rates == {}
    assert views[1].rates["tokens"] > 0
    assert sum(views[1].blocks.values()) == pool.num_blocks
    assert views[1].totals["prompt tokens"] == pool.prefix_query_tokens
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(drawn(views[1], 80))
    assert "tokens/s" in console.export_text()


@pytest.mark.parametrize(
    "body", [b"", b"\xff\x00", b"kvpager_steps_total NaN\n", b"other_steps_total 1\n", b"x" * 3000]
)
def test_an_answer_without_metrics_is_an_error(
    answers: tuple[str, list[bytes]], body: bytes
) -> None:
    url, bodies = answers
    bodies.append(body)
    done = top(url, "--once")
    assert done.exit_code == (2 if body else 1)
    assert done.output.count("\n") == 1


def test_no_answer_is_an_error_and_other_machines_are_not_asked() -> None:
    assert top("http://127.0.0.1:9/metrics", "--once").exit_code == 1
    for url in ("http://example.com/metrics", "https://127.0.0.1/", "file:///etc/passwd"):
        done = top(url, "--once")
        assert done.exit_code == 2
        assert "expected http://127.0.0.1:PORT/metrics" in " ".join(done.output.split())


def test_a_view_of_nothing_is_drawn() -> None:
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(drawn(View("nothing", {}, 0, {}), 40))
    assert "nothing" in console.export_text()
