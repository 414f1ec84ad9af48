"""A recorded replay shows each request while it holds its blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpager.cli.app import app
from kvpager.recording.reader import Recording
from kvpager.recording.replay import ReplayedState
from kvpager.simulate.generate import generate_trace
from kvpager.simulate.replay import replay


def test_each_request_runs_in_one_step_and_ends_in_the_next(tmp_path: Path) -> None:
    trace, path = generate_trace(60, 1, "chat"), tmp_path / "run.jsonl"
    result = replay(trace, 100, "lru", record=path)
    assert replace(result, seconds=0) == replace(replay(trace, 100, "lru"), seconds=0)
    recording = Recording(path)
    state, hits = ReplayedState(recording.header), 0
    fitting = [number for number, prompt in enumerate(trace.prompts) if len(prompt) <= 100]
    for number, step in zip([*fitting, None], recording, strict=True):
        state.apply(step)
        if number is not None:
            ((request, one),) = state.requests.items()
            assert (request, one.state) == (number, "running")
            ((sequence),) = state.sequences.values()
            assert sequence.lengths == [len(trace.prompts[number]) + 1]
            hits += sequence.cached_tokens
    assert recording.is_complete
    assert not state.requests
    assert hits <= result.hits  # prompts that are too long have hits, too
    assert state.totals.evicted == result.evicted


@pytest.mark.parametrize("more", [[], ["--capacity=10,20"], ["--tiers=host=5"]])
def test_the_command_records_one_replay(tmp_path: Path, more: list[str]) -> None:
    path = tmp_path / "run.jsonl"
    options = ["--generate=20", "--policy=lru", f"--record={path}"]
    done = CliRunner().invoke(app, ["simulate", *options, *(more or ["--capacity=10"])])
    if not more:
        assert done.exit_code == 0, done.output
        assert f"recording: {path}" in done.output
        assert Recording(path).header.num_blocks == 11
    else:
        assert done.exit_code == 2
        assert not path.exists()


def test_a_file_of_other_content_is_kept(tmp_path: Path) -> None:
    (path := tmp_path / "notes").write_text("mine")
    options = ["--generate=20", "--policy=lru", "--capacity=10", f"--record={path}"]
    done = CliRunner().invoke(app, ["simulate", *options])
    assert done.exit_code == 2
    assert "the file exists and is not a recording" in " ".join(done.output.split())
    assert path.read_text() == "mine"
