"""The tiers of an engine, for any thread."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from numpy.typing import ArrayLike

from kvpager.engine.fetching import Fetching
from kvpager.storage.tiers.retaining import Retained
from kvpager.storage.tiers.tiering import Tiering
from kvpager.storage.tiers.tiering_stats import TieringStats


class EngineTiers:
    """Implements `TiersOwner` for an engine.

    Args:
        tiering: the engine's.
        fetching: attaches what it loads.
        locked: returns the engine's lock.
        refuse_closed: raises `EngineClosed` if the engine has ended.
    """

    def __init__(
        self,
        tiering: Tiering,
        fetching: Fetching,
        locked: Callable[[], AbstractContextManager[Any]],
        refuse_closed: Callable[[], None],
    ) -> None:
        self._tiering = tiering
        self._fetching = fetching
        self.locked = locked
        self._refuse_closed = refuse_closed

    def tiering(self) -> Tiering:
        """Return the tiering. Call under the lock. Raises: `EngineClosed`."""
        self._refuse_closed()
        return self._tiering

    def warm(self, prompt: ArrayLike, namespace: str | None, wait_s: float) -> int:
        """Load a prompt, and wait until the engine's thread attached it. Raises: `EngineClosed`."""
        with self.locked():
            self._refuse_closed()
            work = self._fetching.warm(prompt, namespace, wait_s)
        return work.result()

    def retain(self, prompt: ArrayLike, namespace: str | None) -> Retained:
        """Keep a cached prompt on the device. O(tokens + live requests).

        Raises: `EngineClosed`; `ValueError` if a live request may need the blocks.
        """
        with self.locked():
            self._refuse_closed()
            return self._fetching.retain(prompt, namespace)

    def stats(self) -> TieringStats:
        """Return current counts. O(stores)."""
        with self.locked():
            return self._fetching.stats()
