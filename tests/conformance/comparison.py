"""One question, asked of every architecture in every mode: does a patched model do the same?

`check(name, mode, variant)` runs the mode on the unpatched model and on the patched one. It says
`identical`, `refused` (transformers raises without paging, and raises the same with it) or `only
paged` (it fails by a known bug of its own, which paging happens to avoid), or it raises
`AssertionError` with the first difference.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kvpager
from kvpager.integrations.huggingface import Patch
from tests.conformance.case import Case, at_least
from tests.conformance.modes import MODES
from tests.support import tiny_models

# How far logits may be apart, in float32, as a share of the largest (and at least this much).
TOLERANCE = 1e-5
IDENTICAL, REFUSED, ONLY_PAGED = "identical", "refused", "only paged"
# Before 5.18, an assistant with windows that are full by the end of its prompt ends in an error.
FAILS_UNPAGED = set() if at_least("5.18") else {"assistant", "assistant, sampling"}


@dataclass(frozen=True)
class Variant:
    """A way to patch. `attention` is what the model is set to, None for its own default."""

    options: dict[str, Any] = field(default_factory=dict)
    attention: str | None = None
    all_models: bool = False
    times: int = 1
    modes: tuple[str, ...] | None = None  # None: all


_FEW = ("greedy", "four beams")
VARIANTS: dict[str, Variant] = {
    "in place": Variant({"block_size": 4}),
    "gathered": Variant({"block_size": 8, "in_place": False}, all_models=True),
    "mapped": Variant({"block_size": 4, "in_place": False, "mode": "virtual"}),
    "prefix cache": Variant({"prefix_cache": True, "block_size": 4}, times=2, modes=_FEW),
    "eager": Variant(attention="eager", modes=_FEW),
    "sdpa": Variant(attention="sdpa", modes=_FEW),
    "kvpager": Variant(attention="kvpager", modes=_FEW),
}
ALL_MODES = {name: mode for group in MODES.values() for name, mode in group.items()}


def variants_of(mode: str) -> list[str]:
    """The ways to patch that a mode is tried with."""
    return [name for name, one in VARIANTS.items() if one.modes is None or mode in one.modes]


def check(name: str, mode: str, variant: str) -> str:
    """Compare patched and unpatched; return the outcome. Raises: `AssertionError`."""
    how = VARIANTS[variant]
    if how.attention is not None and not offers(name, how.attention):
        return REFUSED
    expected = unpatched(name, mode, how.attention)
    case = case_of(name, how.attention)
    with paged(case, how):
        for turn in range(how.times):
            found = outcome(case, mode)
            if _fails_unpaged(mode, expected) and not isinstance(found, Raised):
                return ONLY_PAGED
            try:
                compare(found, expected)
            except AssertionError as error:
                where = f"{name}, {mode}, {variant}, turn {turn + 1}"
                raise AssertionError(f"{where}: {error}") from _cause(found)
    return REFUSED if isinstance(expected, Raised) else IDENTICAL


def _fails_unpaged(mode: str, expected: Any) -> bool:
    known = mode in FAILS_UNPAGED and isinstance(expected, Raised)
    return known and isinstance(expected.error, RuntimeError)


@contextlib.contextmanager
def paged(case: Case, how: Variant) -> Iterator[Patch]:
    """Patch the model for a `with` block; afterwards check the invariants of every pool."""
    with kvpager.patch(None if how.all_models else case.model, **how.options) as patch:
        yield patch
        for pool in patch.memory.pools():
            pool.settle()
            pool.manager.check()


@functools.cache
def offers(name: str, attention: str) -> bool:
    """Return True if the architecture supports this attention in transformers."""
    try:
        case_of(name, attention)
    except ValueError:
        return False
    return True


@functools.lru_cache(maxsize=32)
def case_of(name: str, attention: str | None) -> Case:
    """The model of an architecture with an attention implementation, made once."""
    if attention != "kvpager":
        return Case(name, tiny_models.tiny_model(name, attention=attention), _assistant(name))
    model = tiny_models.tiny_model(name, attention="eager")
    model.set_attn_implementation("kvpager")
    return Case(name, model, _assistant(name))


def _assistant(name: str) -> Any:
    return functools.cache(lambda seed: tiny_models.tiny_model(name, seed=seed))


@functools.lru_cache(maxsize=64)
def unpatched(name: str, mode: str, attention: str | None) -> Any:
    """Return the outcome of transformers alone.

    Where the name is ours, with `eager`; or with `sdpa` if it has that too and they differ, as they
    do for MiniMax with padding.
    """
    if attention != "kvpager":
        return outcome(case_of(name, attention), mode)
    expected = unpatched(name, mode, "eager")
    if offers(name, "sdpa"):
        other = unpatched(name, mode, "sdpa")
        try:
            compare(other, expected)
        except AssertionError:
            return other
    return expected


@dataclass(frozen=True)
class Raised:
    """A mode ended with an error."""

    error: Exception

    def __str__(self) -> str:
        return f"{type(self.error).__name__}: {self.error}"


def outcome(case: Case, mode: str) -> Any:
    """Return the result of a mode, or how it was refused."""
    for module in case.model.modules():
        if hasattr(module, "rope_deltas"):  # Qwen's, left by the call before
            module.rope_deltas = None
    try:
        return ALL_MODES[mode](case)
    except Exception as error:
        return Raised(error)


def _cause(found: Any) -> Exception | None:
    return found.error if isinstance(found, Raised) else None


# ---------------------------------------------------------------- the same, or not


def compare(found: Any, expected: Any, where: str = "") -> None:
    """Raises `AssertionError` at the first difference. Numbers may be `TOLERANCE` apart."""
    if isinstance(expected, Raised) or isinstance(found, Raised):
        kinds = [type(one.error) if isinstance(one, Raised) else None for one in (found, expected)]
        assert kinds[0] is kinds[1], f"patched: {_brief(found)}; unpatched: {_brief(expected)}"
    elif isinstance(expected, Tensor):
        assert isinstance(found, Tensor), f"{where}: {type(found).__name__}, not a tensor"
        _compare_tensors(found, expected, where)
    elif isinstance(expected, dict):
        assert isinstance(found, dict), f"{where}: {found!r}, not a dictionary"
        assert list(found) == list(expected), f"{where}: {list(found)} for {list(expected)}"
        for name, item in expected.items():
            compare(found[name], item, f"{where}.{name}")
    elif isinstance(expected, list | tuple):
        assert isinstance(found, list | tuple), f"{where}: {found!r}, not a list"
        assert len(found) == len(expected), f"{where}: {len(found)} items for {len(expected)}"
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            compare(one, other, f"{where}[{number}]")
    else:
        assert found == expected, f"{where}: {found!r} for {expected!r}"


def _compare_tensors(found: Tensor, expected: Tensor, where: str) -> None:
    assert found.dtype == expected.dtype, f"{where}: {found.dtype} for {expected.dtype}"
    assert found.shape == expected.shape, f"{where}: {found.shape} for {expected.shape}"
    if not expected.is_floating_point():
        assert torch.equal(found, expected), f"{where}: {found.tolist()} for {expected.tolist()}"
        return
    finite = expected.isfinite()
    assert torch.equal(finite, found.isfinite()), f"{where}: other numbers are infinite"
    if finite.any():
        largest = max(1.0, float(expected[finite].abs().max()))
        apart = float((found[finite] - expected[finite]).abs().max())
        assert apart <= TOLERANCE * largest, f"{where}: {apart:.2e} apart, of {largest:.3g}"


def _brief(outcome: Any) -> str:
    return str(outcome)[:300] if isinstance(outcome, Raised) else "no error"
