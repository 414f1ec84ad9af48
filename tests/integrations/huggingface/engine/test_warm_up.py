"""An engine whose kernels are compiled computes a step of every shape before its first request."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from kvpager.integrations.huggingface.engine import Engine
from kvpager.integrations.huggingface.runner import warm_up as warming
from kvpager.integrations.huggingface.runner.model_runner import ModelRunner
from kvpager.plans import StepPlan
from tests.support import tiny_models

PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """The steps that runners compute."""
    found: list[StepPlan] = []
    genuine = ModelRunner.run

    def run(runner: ModelRunner, plan: StepPlan, *args: Any) -> torch.Tensor:
        found.append(plan)
        return genuine(runner, plan, *args)

    monkeypatch.setattr(ModelRunner, "run", run)
    return found


def alone(model: Any) -> list[int]:
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)[0].tolist()
    return ids[1:] if model.config.is_encoder_decoder else ids[len(PROMPT) :]


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize(
    ("name", "memory"),
    [
        ("llama", "8MiB"), ("llama", "100KiB"), ("gemma3", "8MiB"), ("qwen3_next", "8MiB"),
        ("t5", "8MiB"),
    ],
)  # fmt: skip
def test_every_kind_of_model_serves_right_after_warm_up(
    name: str, memory: str, steps: list[StepPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models.tiny_model(name)
    expected = alone(model)
    monkeypatch.setattr(warming, "COMPILING", ("cpu",))
    with Engine(model, memory=memory, max_num_seqs=2, max_batch_tokens=32) as engine:
        before = list(steps)
        output = engine.submit(PROMPT, max_new_tokens=8, do_sample=False).result()
    assert output.token_ids == expected
    assert all(len(plan.token_ids) <= 32 for plan in before[-7:])


def test_steps_of_every_shape_are_computed(
    steps: list[StepPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warming, "COMPILING", ("cpu",))
    with Engine(tiny_models.tiny_model("llama"), memory="8MiB", max_batch_tokens=64):
        counts = [plan.num_scheduled.tolist() for plan in steps]
    assert [1] in counts
    assert [1, 1, 1, 1] in counts
    assert [61] in counts
    assert [1, 1, 1, 61] in counts
    assert {len(plan.copies) for plan in steps} >= {1, 2, 9, 65, 257}


def test_an_engine_on_a_cpu_does_not_warm_up(steps: list[StepPlan]) -> None:
    model = tiny_models.tiny_model("llama")
    with Engine(model, memory="8MiB", forward="packed"):
        assert all(len(plan.copies) == 0 for plan in steps)
