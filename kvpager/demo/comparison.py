"""Compare the tokens of both sides, and tell a near-tie from a wrong token.

In bfloat16 and float16 two correct programs may choose different tokens where two logits are
almost equal, because they add in another order. `DynamicCache` itself does: the same prompt alone
and in a padded batch gives different replies about as often as kvpager does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvpager.demo.model import Engine, Generated
from kvpager.demo.results import Difference
from kvpager.demo.scenarios import Row

# Rounding moves a logit by about one unit in the last place of the largest logit; two logits are
# compared. Measured in bfloat16 and float16: 0.8 units at most at 21 differing tokens.
UNITS_OF_A_NEAR_TIE = 2.0


def differences(
    model: Engine, expected: Sequence[Generated], got: Sequence[Generated], *, beams: bool
) -> Iterator[Difference]:
    """Yield the first difference of each row, judged by transformers' own logits.

    Args:
        model: the unpatched model.
        expected: transformers' replies, call by call.
        got: kvpager's replies.
        beams: judge whole replies by their log-probability, as beam search does.

    O(tokens) for rows that agree; one forward pass (two for beams) for each row that differs.
    """
    for number, (theirs, ours) in enumerate(zip(expected, got, strict=True), start=1):
        call = number if len(expected) > 1 else 0
        for row, (a, b) in enumerate(zip(theirs.rows, ours.rows, strict=True)):
            if a != b:
                prompt = theirs.prompts[row * len(theirs.prompts) // len(theirs.rows)]
                yield _difference(model, prompt, a, b, (call, row + 1), beams=beams)


def _difference(
    model: Engine, prompt: Row, expected: Row, got: Row, place: tuple[int, int], *, beams: bool
) -> Difference:
    shorter = min(len(expected), len(got))
    at = next((i for i in range(shorter) if expected[i] != got[i]), shorter)
    margin = tolerance = None
    if at < shorter:
        last = shorter if beams else at + 1
        rest, other = expected[at:last], got[at:last]
        margin, tolerance = _margin(model, prompt + expected[:at], rest, other)
    chosen = expected[at] if at < len(expected) else None
    differs = got[at] if at < len(got) else None
    return Difference(*place, at + 1, chosen, differs, margin, tolerance)


def _margin(model: Engine, before: Row, expected: Row, got: Row) -> tuple[float, float]:
    """Return log-probability of `expected` less that of `got`, and how much is rounding."""
    logits = model.logits(before + expected[:-1], len(expected))
    others = model.logits(before + got[:-1], len(got)) if len(got) > 1 else logits
    margin = _log_probability(logits, expected) - _log_probability(others, got)
    largest = max(float(logits.abs().max()), float(others.abs().max()))
    # Errors of several tokens are independent, so they add up by their squares.
    return margin, UNITS_OF_A_NEAR_TIE * model.eps * largest * len(expected) ** 0.5


def _log_probability(logits: Tensor, ids: Row) -> float:
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    return float(logits.double().log_softmax(-1).gather(-1, chosen).sum())
