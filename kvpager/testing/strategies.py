"""Hypothesis strategies for what block managers are given.

Prompts come from a tiny alphabet, so that prefixes collide, and are a few blocks long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from kvpager.testing.histories import Choice, Kind, Many, Number, Pick, Tokens

Item = TypeVar("Item")

_PICK_MAX = 31


def prompts(alphabet: int = 3, longest: int = 18, shortest: int = 0) -> SearchStrategy[list[int]]:
    """Token ids, `shortest` to `longest` of them, of 0 to `alphabet` - 1."""
    return st.lists(st.integers(0, alphabet - 1), min_size=shortest, max_size=longest)


def namespaces(names: Sequence[str | None] = (None, "acme")) -> SearchStrategy[str | None]:
    """One of a few namespaces; None is one of its own."""
    return st.sampled_from(list(names))


def picks() -> SearchStrategy[int]:
    """A number that names a live sequence, from the newest on, modulo how many there are."""
    return st.integers(0, _PICK_MAX)


def batches(items: Sequence[Item]) -> SearchStrategy[list[Item]]:
    """Some of the sequences given, none twice, at least one, in any order."""
    return st.lists(st.sampled_from(items), unique=True, min_size=1)


def strategy(kind: Kind, *, alphabet: int = 3, longest: int = 18) -> SearchStrategy[Any]:
    """The strategy for an argument of an `Operation`.

    >>> strategy(Number(3))
    integers(min_value=0, max_value=3)
    """
    if isinstance(kind, Number):
        return st.integers(0, kind.most)
    if isinstance(kind, Pick):
        return picks()
    if isinstance(kind, Choice):
        return st.sampled_from(kind.options)
    if isinstance(kind, Tokens):
        return prompts(alphabet, longest if kind.longest is None else kind.longest)
    if isinstance(kind, Many):
        one = strategy(kind.kind, alphabet=alphabet, longest=longest)
        return st.lists(one, min_size=kind.least, max_size=kind.most)
    raise TypeError(f"kind {kind!r}: expected Number, Pick, Choice, Tokens or Many")
