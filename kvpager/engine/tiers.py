"""What callers may ask of an engine's tiers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from kvpager.storage.tiers.tiering import Tiering


class EngineTiers:
    """The tiers of an engine, for any thread.

    Args:
        tiering: the engine's.
        locked: returns the engine's lock.
        refuse_closed: raises `EngineClosed` if the engine has ended.
    """

    def __init__(
        self,
        tiering: Tiering,
        locked: Callable[[], AbstractContextManager[Any]],
        refuse_closed: Callable[[], None],
    ) -> None:
        self._tiering = tiering
        self._locked = locked
        self._refuse_closed = refuse_closed

    def limit(
        self, namespace: str, *, capacity: int | str | None = None, ttl_s: float | None = None
    ) -> None:
        """Bound what each store keeps of a namespace: bytes such as "4GiB", and seconds. O(1).

        Blocks that other processes saved do not count. Raises: `ValueError`, `TypeError` for a bad
        argument; `EngineClosed`.
        """
        with self._locked():
            self._refuse_closed()
            self._tiering.limit(namespace, capacity=capacity, ttl_s=ttl_s)

    def forget(self, namespace: str) -> int:
        """Drop the cached prompts of a namespace from the device and from all stores.

        Waits for the stores. Running requests may publish their prompts again. Returns how many
        blocks left the stores: those that this process saved or loaded. Raises: `EngineClosed`;
        `TypeError` for a namespace that is no name.
        """
        with self._locked():
            self._refuse_closed()
            dropped = self._tiering.forget(namespace)
        return dropped.result()
