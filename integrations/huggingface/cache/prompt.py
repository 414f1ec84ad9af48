"""The known token ids of a batch's rows, and the namespaces in which prompts are shared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np

from kvpager.plans import Int32, Int64

# Pairs of a `Namespaces` object and a name that `chosen` has set; the last pair of an object holds.
_chosen: ContextVar[tuple[tuple[object, str], ...]] = ContextVar("kvpager_namespaces", default=())


class PrefixKey(NamedTuple):
    """The key of prompts that may share blocks: a namespace and a version of the model."""

    namespace: str | None  # its quota counts the blocks
    version: str | None  # of the model; None if no prompt is kept


class Prompt:
    """The token ids of a batch's rows without padding, for prefix reuse under a key."""

    def __init__(self, rows: list[Int32], key: PrefixKey) -> None:
        self.rows = rows
        self.key = key

    def of(self, rows: Int64) -> Prompt:
        """Return the ids of these rows only. O(rows)."""
        return Prompt([self.rows[row] for row in rows], self.key)

    def followed_by(self, ids: Int32) -> Prompt:
        """Return the prompt with one more id for each row: `ids` [rows]. O(tokens)."""
        return Prompt([np.append(row, ids[i]) for i, row in enumerate(self.rows)], self.key)

    def cut(self, lengths: Int64) -> Prompt:
        """Return the first `lengths` [rows] ids of each row. O(rows)."""
        pairs = zip(self.rows, lengths.tolist(), strict=True)
        return Prompt([row[:length] for row, length in pairs], self.key)

    def ids(self, padding: Int64, start: int, stop: int) -> list[Int32]:
        """Return each row's ids in columns `start` to `stop`; empty if unknown. O(rows)."""
        first, last = np.maximum(start - padding, 0), np.maximum(stop - padding, 0)
        if any(len(row) < end for row, end in zip(self.rows, last, strict=True)):
            return []
        return [row[a:b] for row, a, b in zip(self.rows, first, last, strict=True)]


class Namespaces:
    """The namespaces of the calls that one patch serves; the default one outside of `chosen`."""

    def __init__(self, default: str | None = None) -> None:
        self._default = default

    @property
    def current(self) -> str | None:
        """Return the namespace of the innermost `chosen`, or the default. O(nesting)."""
        chosen = (name for owner, name in reversed(_chosen.get()) if owner is self)
        return next(chosen, self._default)

    @contextmanager
    def chosen(self, namespace: str) -> Iterator[None]:
        """Set the namespace of this thread's, or asyncio task's, calls inside the `with` block."""
        token = _chosen.set((*_chosen.get(), (self, namespace)))
        try:
            yield
        finally:
            _chosen.reset(token)
