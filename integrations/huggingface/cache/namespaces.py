"""The namespace of a call: whose quota its blocks count in, and whose prompts it may share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# What `Namespaces.chosen` has chosen: the last name for each `Namespaces` holds.
_chosen: ContextVar[tuple[tuple[object, str], ...]] = ContextVar("kvpager_namespaces", default=())


class Namespaces:
    """The namespaces of the calls that one patch serves.

    Args:
        default: the namespace of calls that choose none.
    """

    def __init__(self, default: str | None = None) -> None:
        self._default = default

    @property
    def current(self) -> str | None:
        """The namespace of calls made here: the one chosen around them, else the default."""
        chosen = (name for owner, name in reversed(_chosen.get()) if owner is self)
        return next(chosen, self._default)

    @contextmanager
    def chosen(self, namespace: str) -> Iterator[None]:
        """Calls made within are of `namespace`: of this thread, or of this asyncio task."""
        token = _chosen.set((*_chosen.get(), (self, namespace)))
        try:
            yield
        finally:
            _chosen.reset(token)
