"""`kvpager report`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

from kvpager.cli.app import app
from tests.support.recordings import write_recording


def call(*arguments: object):
    return CliRunner().invoke(app, ["report", *map(str, arguments)], prog_name="kvpager")


def test_report_stands_beside_its_recording_and_is_named(tmp_path: Path) -> None:
    result = call(write_recording(tmp_path / "run.jsonl", num_steps=5))
    assert result.exit_code == 0
    page = tmp_path / "run.html"
    assert result.output.startswith(f"report: {page} (")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_bad_recording_is_refused_with_its_line_and_writes_nothing(tmp_path: Path) -> None:
    file = write_recording(tmp_path / "run.jsonl", num_steps=5)
    file.write_bytes(file.read_bytes().replace(b'"step":3', b'"step":4'))
    result = call(file, "-o", tmp_path / "r.html")
    assert result.exit_code == 2
    assert result.stderr == f"kvpager: {file}: line 5: step=4: expected 3\n"
    assert not (tmp_path / "r.html").exists()


def test_recording_of_a_crashed_run_is_shown_with_a_remark(tmp_path: Path) -> None:
    file = write_recording(tmp_path / "run.jsonl", num_steps=5, closed=False)
    file.write_bytes(file.read_bytes()[:-4])
    result = call(file)
    assert result.exit_code == 0
    assert result.stderr == f"kvpager: {file}: line 6 is cut, and ignored\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "none.jsonl: No such file or directory"),
        (["run.jsonl", "-o", "no/such/folder.html"], "expected a file in a folder that exists"),
    ],
)
def test_wrong_usage_is_one_line(arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
