"""Which blocks of which namespace the stores keep, as far as this process knows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvpager import _validate as arguments

_TRACKED_MAX = 1 << 20  # keys of one namespace in one store, about 200 bytes each


@dataclass(frozen=True, slots=True)
class Limit:
    """What each store may keep of a namespace: blocks, and seconds since they were saved."""

    num_blocks: int | None = None
    ttl_s: float | None = None

    @classmethod
    def parsed(cls, capacity: int | str | None, ttl_s: float | None, block_bytes: int) -> Limit:
        """Return the limit of a capacity, as bytes or a text. Raises: `ValueError`, `TypeError`."""
        num_bytes = arguments.parse_memory(capacity, "capacity")
        num_blocks = None if num_bytes is None else num_bytes // block_bytes
        return cls(num_blocks, None if ttl_s is None else arguments.seconds("ttl_s", ttl_s))


def checked_name(namespace: str) -> str:
    """Return the name of a namespace. Raises: `TypeError` if it is none."""
    if not isinstance(namespace, str):
        raise TypeError(f"namespace={namespace!r}: expected a name")
    return namespace


class NamespaceKeys:
    """The keys that this process saved or loaded, by store and namespace. Thread-safe.

    Keys tell nothing about their namespace, so blocks of earlier processes and of other machines
    are not known before they are loaded. Blocks without a namespace are not tracked.
    """

    def __init__(self, num_stores: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Track the keys of stores 0 to `num_stores` - 1. `clock` returns seconds."""
        self._clock = clock
        self._lock = threading.Lock()
        # By namespace: keys, the oldest first, with the time of the save.
        self._kept: list[dict[str, dict[bytes, float]]] = [{} for _ in range(num_stores)]
        self._namespaces: list[dict[bytes, str]] = [{} for _ in range(num_stores)]
        self._limits: dict[str, Limit] = {}

    def set_limit(self, namespace: str, limit: Limit) -> None:
        """Bound a namespace in each store. `surplus` then returns what is too much. O(1)."""
        with self._lock:
            self._limits[namespace] = limit

    def add(
        self, store: int, namespace: str | None, keys: Iterable[bytes], *, is_new: bool = False
    ) -> None:
        """Record that a store has keys of a namespace. O(keys).

        A known key keeps its age, unless it `is_new` in the store.
        """
        if namespace is None:
            return
        with self._lock:
            kept, now = self._kept[store].setdefault(namespace, {}), self._clock()
            for key in keys:
                # Namespaces without a secret have the same keys: the first one has them.
                if self._namespaces[store].setdefault(key, namespace) == namespace:
                    if is_new:
                        kept.pop(key, None)
                    kept.setdefault(key, now)
            if len(kept) > _TRACKED_MAX:
                self._forget(store, list(kept)[: len(kept) - _TRACKED_MAX])
            elif not kept:
                del self._kept[store][namespace]

    def remove(self, store: int, keys: Iterable[bytes]) -> None:
        """Record that a store lost keys. O(keys)."""
        with self._lock:
            self._forget(store, keys)

    def surplus(self, store: int) -> dict[bytes, float]:
        """Return the keys that the store is to drop, for `dropped`. O(limits + keys returned)."""
        with self._lock:
            gone = dict[bytes, float]()
            for namespace, limit in self._limits.items():
                gone |= self._surplus(self._kept[store].get(namespace, {}), limit)
            return gone

    def _surplus(self, kept: dict[bytes, float], limit: Limit) -> dict[bytes, float]:
        """Return the keys over a limit, the oldest ones."""
        most = len(kept) if limit.num_blocks is None else limit.num_blocks
        oldest = -float("inf") if limit.ttl_s is None else self._clock() - limit.ttl_s
        gone = dict[bytes, float]()
        for key, saved_at in kept.items():
            if len(kept) - len(gone) <= most and saved_at > oldest:
                break
            gone[key] = saved_at
        return gone

    def of(self, store: int, namespace: str) -> dict[bytes, float]:
        """Return all keys of a namespace, for `dropped`. O(keys)."""
        with self._lock:
            return dict(self._kept[store].get(namespace, {}))

    def dropped(self, store: int, saved_at: dict[bytes, float]) -> None:
        """Record that a store dropped keys. Those that it got again meanwhile stay. O(keys)."""
        with self._lock:
            kept, namespaces = self._kept[store], self._namespaces[store]
            self._forget(
                store,
                [
                    key
                    for key, at in saved_at.items()
                    if key in namespaces and kept[namespaces[key]][key] == at
                ],
            )

    def _forget(self, store: int, keys: Iterable[bytes]) -> None:
        for key in keys:
            namespace = self._namespaces[store].pop(key, None)
            if namespace is None:
                continue
            kept = self._kept[store][namespace]
            del kept[key]
            if not kept:
                del self._kept[store][namespace]
