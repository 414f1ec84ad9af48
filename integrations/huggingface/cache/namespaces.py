"""The namespace of a call, which decides its quota and the prompts that it may share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# Pairs of a `Namespaces` object and a name that `chosen` has set; the last pair of an object holds.
_chosen: ContextVar[tuple[tuple[object, str], ...]] = ContextVar("kvpager_namespaces", default=())


class Namespaces:
    """The namespaces of the calls that one patch serves.

    Args:
        default: the namespace of calls outside of `chosen`.
    """

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
