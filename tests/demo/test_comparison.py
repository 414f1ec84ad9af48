"""The demo's judgement of differing tokens: a near-tie within the dtype's rounding, or wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from kvpager.demo.comparison import differences
from kvpager.demo.results import Difference

PROMPT = [0, 1]


@dataclass
class Scripted:
    """A model whose logits depend on the last token alone."""

    table: torch.Tensor
    eps: float = torch.finfo(torch.bfloat16).eps
    asked: list[int] = field(default_factory=list)

    def logits(self, ids: list[int], num_last: int) -> torch.Tensor:
        self.asked.append(len(ids))
        return self.table[torch.tensor(ids[-num_last:])]


@dataclass
class Call:
    prompts: list[list[int]]
    rows: list[list[int]]


def table(**gaps: float) -> torch.Tensor:
    """After any token, token 2 has logit 8 and token 3 has `gap` less; all others have 0."""
    logits = torch.zeros(5, 5)
    logits[:, 2], logits[:, 3] = 8.0, 8.0 - gaps["gap"]
    return logits


def judge(model: Scripted, a: list[int], b: list[int], beams: bool = False) -> list[Difference]:
    return list(differences(model, [Call([PROMPT], [a])], [Call([PROMPT], [b])], beams=beams))


def test_rows_that_agree_cost_no_forward_pass() -> None:
    model = Scripted(table(gap=1.0))
    assert judge(model, [2, 2], [2, 2]) == []
    assert model.asked == []


@pytest.mark.parametrize(("gap", "is_near_tie"), [(0.0, True), (2**-3, True), (2**-2, False)])
def test_a_gap_of_two_units_is_a_near_tie(gap: float, is_near_tie: bool) -> None:
    (found,) = judge(Scripted(table(gap=gap)), [2, 2, 4], [2, 3, 4])
    assert (found.row, found.position, found.expected, found.got) == (1, 2, 2, 3)
    assert found.margin == pytest.approx(gap, abs=1e-6)
    assert found.tolerance == 2**-3
    assert found.is_near_tie is is_near_tie


def test_the_same_gap_is_wrong_in_float32() -> None:
    (found,) = judge(Scripted(table(gap=2**-4), torch.finfo(torch.float32).eps), [2], [3])
    assert not found.is_near_tie


def test_a_token_that_transformers_prefers_is_judged_by_size() -> None:
    (found,) = judge(Scripted(table(gap=1.0)), [3], [2])
    assert found.margin == pytest.approx(-1.0)
    assert not found.is_near_tie


def test_a_reply_that_ends_early_is_never_a_near_tie() -> None:
    (found,) = judge(Scripted(table(gap=0.0)), [2, 2], [2])
    assert (found.expected, found.got, found.margin) == (2, None, None)
    assert not found.is_near_tie


def test_beams_are_judged_by_whole_replies() -> None:
    model = Scripted(table(gap=1.0))
    (found,) = judge(model, [2, 3, 2, 2], [2, 2, 3, 2], beams=True)
    assert found.position == 2
    assert found.margin == pytest.approx(0.0, abs=1e-6)
    assert found.is_near_tie
    (found,) = judge(model, [2, 2, 2, 2], [2, 3, 3, 2], beams=True)
    assert found.margin == pytest.approx(2.0)
    assert not found.is_near_tie


def test_each_row_is_judged_and_calls_are_numbered() -> None:
    model = Scripted(table(gap=2**-5))
    calls = [Call([PROMPT, PROMPT], [[2, 2], [2, 2]]), Call([PROMPT], [[2]])]
    others = [Call([PROMPT, PROMPT], [[2, 2], [3, 2]]), Call([PROMPT], [[4]])]
    tie, wrong = differences(model, calls, others, beams=False)
    assert (tie.call, tie.row, tie.is_near_tie) == (1, 2, True)
    assert (wrong.call, wrong.row, wrong.is_near_tie) == (2, 1, False)
