"""A model, what it is fed, and what `generate` says about it, in a form that can be compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version

from tests.support import tiny_models

# Lengths of the prompts of a batch.
UNLIKE, LONG, EQUAL, ONE = (9, 14, 3), (20, 31), (11, 11), (13,)


@dataclass(frozen=True)
class Case:
    """An architecture's model, and prompts as that model takes them."""

    name: str
    model: Any
    assistant: Callable[[int], Any]

    @property
    def has_encoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    def inputs(self, lengths: tuple[int, ...] = UNLIKE, seed: int = 0) -> dict[str, torch.Tensor]:
        return self.adapted(tiny_models.prompts(list(lengths), seed=seed))

    def adapted(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        adapt = tiny_models.ARCHITECTURES[self.name].adapt
        return inputs if adapt is None else adapt(inputs)


Mode = Callable[[Case], Any]


def run(case: Case, inputs: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return what `generate` returns for these options, always with the same random numbers."""
    torch.manual_seed(options.pop("seed", 7))
    defaults = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": tiny_models.PAD,
        "return_dict_in_generate": True,
        "output_logits": True,
        "output_scores": True,
    }
    inputs = case.inputs() if inputs is None else inputs
    return case.model.generate(**inputs, **{**defaults, **options})


def text(case: Case, inputs: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Tokens, and the numbers that they were chosen by."""
    output = run(case, inputs, **options)
    names = ("sequences", "logits", "scores", "sequences_scores", "beam_indices")
    return {name: output[name] for name in names if output.get(name) is not None}


def with_options(**options: Any) -> Mode:
    return lambda case: text(case, **copy.deepcopy(options))


def attempted(action: Callable[[], Any]) -> Any:
    """Return the result of `action`, or the name of the error that it raises."""
    try:
        return action()
    except Exception as error:
        return type(error).__name__


def at_least(version: str) -> bool:
    """Return True if the installed transformers is `version` or newer."""
    return Version(transformers.__version__) >= Version(version)
