"""A patched model does what the unpatched one does: any architecture, any mode of transformers.

Here every architecture goes through a few modes, and a few architectures through all of them;
`make conformance` takes every architecture through every mode (`conformance_report`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.cache_name import NAME

transformers = pytest.importorskip("transformers")

from transformers.cache_utils import (  # noqa: E402
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

import kvpager  # noqa: E402
from kvpager.integrations.huggingface.cache.layers import (  # noqa: E402
    PagedLayer,
    PagedSlidingWindowLayer,
)
from tests.conformance import comparison as conformance  # noqa: E402
from tests.conformance import report as conformance_report  # noqa: E402
from tests.conformance.case import run  # noqa: E402
from tests.support import tiny_models  # noqa: E402

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "models.md"
# Modes that every architecture is tried in, and architectures that are tried in every mode.
CORE = {
    "greedy": ("in place", "gathered", "mapped"),
    "four beams": ("in place", "mapped"),
    "three samples each": ("in place",),
    "copies of a cache": ("in place",),
}
REPRESENTATIVES = ["llama", "gemma3", "deepseek_v3", "qwen3_next", "t5"]
# Those that are tried in every way to patch as well; the others with the default alone.
PATCHED_IN_EVERY_WAY = ["llama", "t5"]

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def each(names: Iterable[str]) -> list[Any]:
    """The names, those that this transformers does not have as skipped ones."""
    skip = pytest.mark.skip(reason=f"not in transformers {transformers.__version__}")
    return [
        name if tiny_models.is_known(name) else pytest.param(name, marks=skip) for name in names
    ]


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("name", each(tiny_models.ARCHITECTURES))
def test_every_architecture_does_as_unpatched(name: str) -> None:
    for mode, variants in CORE.items():
        for variant in variants:
            conformance.check(name, mode, variant)


@pytest.mark.mostly_slow(quick=6)
@pytest.mark.parametrize("name", each(tiny_models.ARCHITECTURES))
def test_every_layer_of_plain_attention_is_paged(name: str) -> None:
    case = conformance.case_of(name, None)
    plain = caches_of(run(case, max_new_tokens=2))
    with kvpager.patch(case.model) as patch:
        paged = caches_of(run(case, max_new_tokens=2))
        if name == "whisper":  # it returns copies that it makes of its caches
            assert patch.stats().in_place_reads > 0
            return
    for found, expected in zip(paged, plain, strict=True):
        kinds = [type(layer) for layer in getattr(expected, "layers", [])]
        if type(expected) is DynamicCache:  # not a class of the model's own
            kinds = [PAGED.get(kind, kind) for kind in kinds]
        assert [type(layer) for layer in getattr(found, "layers", [])] == kinds


PAGED = {DynamicLayer: PagedLayer, DynamicSlidingWindowLayer: PagedSlidingWindowLayer}


def caches_of(output: Any) -> list[Any]:
    cache = output.get(NAME)
    if isinstance(cache, EncoderDecoderCache):
        return [cache.self_attention_cache, cache.cross_attention_cache]
    return [cache]


@pytest.mark.mostly_slow(quick=1)
@pytest.mark.parametrize("mode", conformance.ALL_MODES)
@pytest.mark.parametrize("name", each(REPRESENTATIVES))
def test_every_mode_does_as_unpatched(name: str, mode: str) -> None:
    variants = conformance.variants_of(mode) if name in PATCHED_IN_EVERY_WAY else ["in place"]
    for variant in variants:
        conformance.check(name, mode, variant)


# ---------------------------------------------------------------- the suite itself


@pytest.mark.mostly_slow(quick=2)
@pytest.mark.parametrize("name", each(tiny_models.ARCHITECTURES))
def test_text_varies_so_that_a_wrong_key_shows(name: str) -> None:
    sequences = run(conformance.case_of(name, None), max_new_tokens=24).sequences
    assert min(len(set(row[-24:].tolist())) for row in sequences) >= 4


ONE = {"sequences": torch.tensor([[5, 9]]), "logits": [torch.tensor([1.0, 30.0])]}


@pytest.mark.parametrize(
    "other",
    [
        {**ONE, "sequences": torch.tensor([[5, 8]])},
        {**ONE, "sequences": torch.tensor([[5, 9, 1]])},
        {**ONE, "logits": [torch.tensor([1.0, 30.001])]},
        {**ONE, "logits": [torch.tensor([1.0, float("-inf")])]},
        {**ONE, "logits": [torch.tensor([1.0, float("nan")])]},
        {**ONE, "logits": []},
        {"sequences": ONE["sequences"]},
        conformance.Raised(ValueError("refused")),
    ],
    ids=["token", "length", "logit", "infinite", "nan", "steps", "output", "error"],
)
def test_a_difference_is_noticed(other: Any) -> None:
    conformance.compare(ONE, ONE)
    with pytest.raises(AssertionError):
        conformance.compare(other, ONE)
    with pytest.raises(AssertionError):
        conformance.compare(ONE, other)


def test_another_kind_of_error_is_noticed() -> None:
    conformance.compare(conformance.Raised(ValueError("a")), conformance.Raised(ValueError("b")))
    with pytest.raises(AssertionError):
        conformance.compare(conformance.Raised(ValueError()), conformance.Raised(TypeError()))


def test_the_document_names_the_architectures_and_modes_of_the_suite() -> None:
    document = conformance_report.read(DOCUMENT)
    assert document.architectures == list(tiny_models.ARCHITECTURES)
    assert document.modes == {group: list(modes) for group, modes in conformance.MODES.items()}
