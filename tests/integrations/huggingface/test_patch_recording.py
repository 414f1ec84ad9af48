"""What `patch(record=...)` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kvpager
from kvpager.recording.format import Step
from kvpager.recording.reader import Recording
from kvpager.recording.replay import ReplayedState
from tests.support.tiny_models import tiny_model

PROMPT = torch.arange(3, 43)[None]


def replayed(path: Path) -> list[tuple[Step, int]]:
    """Return each step with the tokens of the live rows; tables agree with counts at each."""
    recording = Recording(path)
    state, steps = ReplayedState(recording.header), []
    for step in recording:
        state.apply(step)
        filled = state.filled()
        assert (len(filled), sum(filled.values())) == (state.counts.held, state.counts.tokens)
        steps.append((step, sum(each.lengths[0] for each in state.sequences.values())))
    assert recording.is_complete
    assert not state.sequences
    assert not state.requests
    return steps


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_each_forward_pass_is_a_step(tmp_path: Path, prefix_cache: bool) -> None:
    path, model = tmp_path / "run.jsonl", tiny_model("llama")
    expected = model.generate(PROMPT, max_new_tokens=5, do_sample=False)
    with kvpager.patch(model, prefix_cache=prefix_cache, record=path):
        for _ in range(2):
            found = model.generate(PROMPT, max_new_tokens=5, do_sample=False)
            assert torch.equal(found, expected)
    steps = replayed(path)
    lengths = [length for _, length in steps if length]
    once = [40, 41, 42, 43, 44]  # the last token is not computed
    assert lengths == once * 2
    arrived = [new[:3] for step, _ in steps for new in step.new]
    assert [prompt for _, prompt, _ in arrived] == [40, 40]
    assert Recording(path).header.model == type(model).__name__


def test_rows_of_a_batch_and_of_beams_are_recorded(tmp_path: Path) -> None:
    path, model = tmp_path / "run.jsonl", tiny_model("llama")
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "num_beams": 3}
    expected = model.generate(PROMPT.repeat(2, 1), **options)
    with kvpager.patch(model, record=path):
        assert torch.equal(model.generate(PROMPT.repeat(2, 1), **options), expected)
    assert len(replayed(path)) >= 20


def test_a_file_of_other_content_is_refused_and_the_model_is_as_before(tmp_path: Path) -> None:
    (path := tmp_path / "notes").write_text("mine")
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="not a recording"):
        kvpager.patch(model, record=path)
    assert path.read_text() == "mine"
    with kvpager.patch(model):
        model.generate(PROMPT, max_new_tokens=2)


def test_a_recorder_that_fails_costs_no_token(tmp_path: Path) -> None:
    path, model = tmp_path / "run.jsonl", tiny_model("llama")
    expected = model.generate(PROMPT, max_new_tokens=5, do_sample=False)
    with kvpager.patch(model, record=path) as patch:
        recorder = patch.memory.recorder
        assert recorder is not None
        recorder._recorder._changes.look = lambda: 1 / 0  # type: ignore[assignment, method-assign, return-value]
        assert torch.equal(model.generate(PROMPT, max_new_tokens=5, do_sample=False), expected)
