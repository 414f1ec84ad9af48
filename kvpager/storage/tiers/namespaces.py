"""Which blocks of which namespace the stores keep, as far as this process knows."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

_TRACKED_MAX = 1 << 20  # keys of one namespace in one store, about 200 bytes each


@dataclass(frozen=True, slots=True)
class Limit:
    """What each store may keep of a namespace: blocks, and seconds since they were saved."""

    num_blocks: int | None = None
    ttl_s: float | None = None


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

    def add(self, store: int, namespace: str | None, keys: Iterable[bytes]) -> None:
        """Record that a store has keys of a namespace. O(keys)."""
        if namespace is None:
            return
        with self._lock:
            kept, now = self._kept[store].setdefault(namespace, {}), self._clock()
            for key in keys:
                # Namespaces without a secret have the same keys: the first one has them.
                if self._namespaces[store].setdefault(key, namespace) == namespace:
                    kept.setdefault(key, now)
            if len(kept) > _TRACKED_MAX:
                self._forget(store, list(kept)[: len(kept) - _TRACKED_MAX])
            elif not kept:
                del self._kept[store][namespace]

    def remove(self, store: int, keys: Iterable[bytes]) -> None:
        """Record that a store lost keys. O(keys)."""
        with self._lock:
            self._forget(store, keys)

    def surplus(self, store: int) -> list[bytes]:
        """Remove and return the keys that the store is to drop. O(limits + keys returned)."""
        with self._lock:
            gone = list[bytes]()
            for namespace, limit in self._limits.items():
                gone += self._surplus(self._kept[store].get(namespace, {}), limit)
            self._forget(store, gone)
            return gone

    def _surplus(self, kept: dict[bytes, float], limit: Limit) -> list[bytes]:
        """Return the keys over a limit, the oldest ones."""
        most = len(kept) if limit.num_blocks is None else limit.num_blocks
        oldest = -float("inf") if limit.ttl_s is None else self._clock() - limit.ttl_s
        gone = list[bytes]()
        for key, saved_at in kept.items():
            if len(kept) - len(gone) <= most and saved_at > oldest:
                break
            gone.append(key)
        return gone

    def take(self, store: int, namespace: str) -> list[bytes]:
        """Remove and return all keys of a namespace. O(keys)."""
        with self._lock:
            keys = list(self._kept[store].get(namespace, {}))
            self._forget(store, keys)
            return keys

    def _forget(self, store: int, keys: Iterable[bytes]) -> None:
        for key in keys:
            namespace = self._namespaces[store].pop(key, None)
            if namespace is None:
                continue
            kept = self._kept[store][namespace]
            del kept[key]
            if not kept:
                del self._kept[store][namespace]
